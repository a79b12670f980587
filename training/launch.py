"""Composer's launcher, with a grace period for the ranks that can be set.

    python -m training.launch --grace 110 -n 8 pretrain.py yamls/vitl.yaml

When the launcher gets SIGTERM, it sends SIGTERM to the ranks. `composer` sends SIGKILL 30 s later,
and torchrun as well, whatever the cloud grants; neither has an option for it. All arguments after
--grace are Composer's.
"""

import argparse
import sys
from datetime import timedelta

from composer.cli import launcher


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], add_help=False, allow_abbrev=False
    )
    grace_help = "seconds from SIGTERM to SIGKILL, a few less than the cloud grants"
    parser.add_argument("--grace", type=float, default=30.0, help=grace_help)
    options, arguments = parser.parse_known_args(sys.argv[1:])
    if not 0 < options.grace < 86400:
        parser.error(f"--grace {options.grace}: must be seconds, above 0 and below 86400")
    sys.argv[1:] = arguments
    launcher.CLEANUP_TIMEOUT = timedelta(seconds=options.grace)
    sys.exit(launcher.main())


if __name__ == "__main__":
    main()
