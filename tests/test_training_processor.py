"""The name of the processor costs no time."""

from composer.utils import collect_env
from test_eval import evaluate_file, save_classifier


def test_no_process_is_started_to_name_the_processor(demo, tmp_path, monkeypatch):
    """The processes of py-cpuinfo take a second."""
    monkeypatch.setattr(collect_env, "get_cpu_model", None)  # which starts them; a call would raise
    save_classifier(tmp_path / "classifier.pt")
    assert evaluate_file(tmp_path, accuracy={"paths": [str(demo / "test_images")]})
