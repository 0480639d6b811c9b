"""Run a module like ``python -m``, but without the working folder on its path: ``[--in FOLDER] MODULE WORDS...``.

``python -m`` puts the working folder first on ``sys.path``, so a ``queue.py`` next to a recipe would shadow the
standard library's. Python 3.11 has ``-P`` to prevent this, 3.10 has nothing. A script's path begins with the script's
own folder instead: this one, which must hold nothing else. ``--in`` changes the working folder first.
"""

import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))
# With PYTHONSAFEPATH Python omits the entry itself. Entries of PYTHONPATH are the user's choice and stay.
if sys.path and os.path.abspath(sys.path[0]) == _here:
    del sys.path[0]

import runpy  # noqa: E402 - only now it is certain to be the standard library's

if __name__ == "__main__":
    _words = sys.argv[1:]
    if _words[0] == "--in":
        os.chdir(_words[1])
        del _words[:2]
    sys.argv[:] = _words
    runpy.run_module(_words[0], run_name="__main__", alter_sys=True)
