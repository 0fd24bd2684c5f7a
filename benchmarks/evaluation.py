"""What the evaluation script costs beside vLLM itself, and how fast recorded answers are scored.

    make bench-eval MODEL=/path/to/model DATA=test.jsonl

In one process and one load, `LLM.chat` over all prompts and our way of asking (each answer saved as it arrives) take
turns; the ratio of each turn is printed, and their median.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vLLM's environment does not have the package

from llamafactory_ext.evaluation.asking import make_engine
from llamafactory_ext.evaluation.engines import Job, Sampling, Settings
from llamafactory_ext.evaluation.generations import Generation, Run
from llamafactory_ext.evaluation.questions import load_prompt, load_questions, messages
from llamafactory_ext.evaluation.scoring import score_run
from llamafactory_ext.evaluation.vllm_engine import ask_vllm, load_vllm, vllm_sampling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=4)
    args = parser.parse_args()

    questions, _ = load_questions(args.data, limit=args.problems)
    jobs = [Job("base", question.index, messages(question, load_prompt("paper"), None)) for question in questions]
    settings = Settings(args.model, {}, Sampling(max_tokens=args.max_tokens), dtype="float32")
    make_engine("vllm", settings)  # sets vLLM's defaults for a CPU
    llm = load_vllm(settings)
    llm.chat([jobs[0].messages], vllm_sampling(settings, jobs[:1]), use_tqdm=False)  # warm

    ratios = []
    answers: list[Generation] = []
    for turn in range(args.turns):
        bare = timed(llm, lambda: llm.chat([job.messages for job in jobs], vllm_sampling(settings, jobs)))
        with tempfile.TemporaryDirectory() as folder, Run(Path(folder)) as run:
            run.open({})

            def ours(run: Run = run) -> None:
                answers.clear()
                for _, generation in ask_vllm(llm, settings, jobs):
                    run.append(generation)
                    answers.append(generation)

            own = timed(llm, ours)
        ratios.append(own / bare)
        print(f"turn {turn + 1}: LLM.chat {bare:.2f} s, ours {own:.2f} s, ratio {ratios[-1]:.3f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.3f}")
    report_scoring(answers)


def timed(llm, work) -> float:
    llm.reset_prefix_cache()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def report_scoring(answers: list[Generation], count: int = 1319) -> None:
    """Score as many answers as GSM8K's test set has, each a real one."""
    from decimal import Decimal

    from llamafactory_ext.evaluation.questions import Question

    questions = [Question(index, "", Decimal(7)) for index in range(count)]
    recorded = {index: Generation(index, *_rest(answers[index % len(answers)])) for index in range(count)}
    start = time.perf_counter()
    score_run(questions, recorded)
    print(f"{count} answers scored in {time.perf_counter() - start:.2f} s")


def _rest(generation: Generation) -> tuple:
    return generation.text, generation.token_ids, generation.finish_reason


if __name__ == "__main__":
    main()
