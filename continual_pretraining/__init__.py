"""Continued pretraining with DeepSpeed: a recipe's run from its source to the export.

``recipe`` says what is trained; ``tokens`` and ``data`` give the rows of each step, and ``engine`` computes it; ``run``
leads the ranks, saves and continues; ``launchers`` start them; ``watch`` shows a run, ``estimate`` what it will take.
"""
