"""The authors' benchmarks, studies, proofs and demo; it imports the package and nothing imports it.

Each file here is a command (``python -m lab.NAME``). Each folder holds what commands share:

    demo, make_cldr_questions       train two tiny models on true facts: cldr/, results/steps.py
    first_results, study            compare methods of training and write pages: results/, studies/
    bench, bench_run, bench_convert, bench_rules, bench_plan, bench_decoding, bench_sharding,
    native_speed
                                    measure: benchmarks/, decoding/
    build_llama_cpp, contest        compare decoders of others with ours: contests/
    bench_llama_cpp                 llama.cpp with and without an extracted draft: llama_cpp/
    bench_serving, serving_clients  compare servers of others with ours, run their clients: serving/
    prove_decoding, prove_vllm, kill_test, accept_npu
                                    prove: decoding/, vllm_proof/, reliability/, acceptance/
    widen                           writes a wider model of the same function, for measurements
    megatron_versions               test under every supported megatron-core: versions/
"""
