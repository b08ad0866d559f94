"""Two thousand short requests with two hundred distinct vectors, through a table far smaller than that."""

from support import differences, engine, generate, oracle, random_prompts, random_spec, report, status, tiny_model

VECTORS, REQUESTS = 200, 2000


def main() -> None:
    folder, model = tiny_model()
    specs = [random_spec(1000 + i, layers=[i % 4], phase=("all", "prefill", "decode")[i % 3]) for i in range(VECTORS)]
    prompts = random_prompts([2 + i % 7 for i in range(VECTORS)], seed=2)
    expected = oracle(model, prompts, specs, 3, batch=50)
    llm = engine(folder, steering={}, max_num_seqs=32)
    found = generate(llm, prompts * (REQUESTS // VECTORS), specs * (REQUESTS // VECTORS), 3)
    report({"differences": differences(found, expected * (REQUESTS // VECTORS)), "status": status(llm)})


if __name__ == "__main__":
    main()
