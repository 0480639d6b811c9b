"""Runs torchrun without its messages on how ranks ended: the launcher reports that once, from ``logs/ends``.

torchrun would print a traceback for every failure and for every signal that it passes on.
"""

from __future__ import annotations

import logging
import sys

from smolconv.errors import first_line

#: torchrun's loggers for signals to ranks and their ends. Other loggers report errors of the rendezvous.
_LOGGERS = ("agent.server.api", "multiprocessing.api")


def main() -> None:
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import main as torchrun

    for name in _LOGGERS:
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        torchrun()
    except ChildFailedError:
        sys.exit(1)
    except SignalException as error:
        sys.exit(128 + int(error.sigval))
    except (RendezvousError, DistError) as error:
        sys.exit(f"torchrun: {first_line(error)}")


if __name__ == "__main__":
    main()
