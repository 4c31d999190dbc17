"""The run around the steps: inputs, start, loop, checkpoints, evaluation and reports.

How a run decides where it starts, in this order:

1. ``inputs.open_inputs``, on every rank before any process group exists. --pretrained-checkpoint
   becomes --load with --finetune if the run has no checkpoint of its own yet. Then
   ``inputs.search_checkpoints``: --load is searched, and checkpoints of this run in --save take
   precedence (``same_run.resume_in_save``), so that the same command started again resumes.
2. ``start.find_starting_point``, once the processes have met and rank 0 holds the lock of --save.
   Rank 0 searches again, since an earlier start of the run may have saved meanwhile.
3. ``checkpoints.choose_checkpoint``, on all ranks: the newest checkpoint without damage is taken,
   damaged ones are passed over. What may have changed since is checked by ``resume``.
4. ``checkpoints.agree_on_run``: the run's name and what it started from, kept across resumes.
"""
