"""torchrun, silent about how its ranks ended: each leaves that in ``logs/ends``, and it is said once from there.

torchrun itself would print a traceback of its own for every failure, and for every signal that it passes on.
"""

from __future__ import annotations

import logging
import sys

from smolconv.errors import first_line

#: They tell of ranks that are sent signals or have ended; what goes wrong in a rendezvous is told by others.
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
