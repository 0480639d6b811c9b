"""Our own fuzzer: real inputs of every reader, damaged, and a judge of what smolconv makes of them.

``inputs`` has the seeds and the commands that each is fed to, ``mutations`` carries out a damage that is plain data,
``strategies`` draws damages by hypothesis, ``judge`` runs one in a limited process and says what it was, ``minimise``
makes a failure small, and ``campaign`` is ``make fuzz``.
"""
