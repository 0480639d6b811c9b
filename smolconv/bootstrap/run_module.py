"""Run a module as ``python -m`` does, but without the working folder on its path: ``[--in FOLDER] MODULE WORDS...``.

``python -m`` puts the working folder first on ``sys.path``, so that a ``queue.py`` beside a recipe is imported in place
of the standard library's. Python 3.11 has ``-P`` against it, 3.10 has nothing. A script's path begins with the script's
own folder instead: that is this one, in which nothing else may ever lie. ``--in`` changes the working folder first.
"""

import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))
# With PYTHONSAFEPATH Python leaves the entry out by itself; what PYTHONPATH says is the user's own wish and stays.
if sys.path and os.path.abspath(sys.path[0]) == _here:
    del sys.path[0]

import runpy  # noqa: E402 - only now is it sure to be the standard library's

if __name__ == "__main__":
    _words = sys.argv[1:]
    if _words[0] == "--in":
        os.chdir(_words[1])
        del _words[:2]
    sys.argv[:] = _words
    runpy.run_module(_words[0], run_name="__main__", alter_sys=True)
