"""The authors' benchmarks, studies, proofs and demo; it imports the package and nothing imports it.

Each file here is a command (``python -m lab.NAME``), each folder holds what commands share:

    demo, make_cldr_questions                                   trains two tiny models on true facts: cldr/, results/steps.py
    first_results, study                                        compare ways to train and weigh exits, and write pages: results/, studies/
    bench, bench_run, bench_convert, bench_rules, bench_plan,
    bench_decoding, bench_sharding                              measure: benchmarks/, planning/, decoding/
    prove_decoding, kill_test, accept_npu                       prove: decoding/, reliability/, acceptance/
"""
