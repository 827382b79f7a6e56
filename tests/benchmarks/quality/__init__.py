"""Quality at equal bytes: DPQ beside full tables and every baseline. `python -m tests.benchmarks.quality`.

`stored` and `sizes` count bytes; `scalars`, `faiss_codes` and `reconstruction` compress a trained table after training
(`post_training` applies them to a run); `baselines` are tables that are trained small; `grid` lists the cases, `worker`
does one, `runner` all that are missing; `bootstrap`, `pictures` and `report` make something of the lines.
"""
