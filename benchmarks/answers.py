"""How long the experts' answers take: prompts together against one at a time, by the same model in the same run.

``python -m benchmarks.answers [--prompts N] [--answers N] [--tokens N]`` prints seconds and their ratio as JSON. The
model is the student of the language suite playing one of its experts, as a learned merge asks it; greedy answers of
both ways must agree but for rounding, which is counted.
"""

import argparse
import json
import time
from typing import Any


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--answers", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--domain", default="translate")
    print(json.dumps(measured(parser.parse_args()), indent=1))


def measured(options: Any) -> dict[str, Any]:
    """Return seconds of both ways, and how many greedy answers are the same."""
    from consilience.api import build_recipe, plan_recipe
    from consilience.learned.run import Run, groups_of
    from consilience.student.bank import Bank
    from consilience.student.student import Settings, make_student
    from consilience.tasks.generate import sample
    from consilience.tasks.load import load_tokenizer
    from consilience.tasks.rows import read_rows
    from suites.language import DOMAINS, adapter_path, calibration_path
    from suites.language.base import base_path

    named = {domain: str(adapter_path(domain)) for domain in DOMAINS}
    plan = plan_recipe(build_recipe("task_arithmetic", str(base_path()), named, {}))
    bank = Bank(plan, groups_of(Run(plan), "tensor", (), (0.3,) * len(named)).groups)
    student = make_student(plan, bank, Settings("mixed"))
    student.become(DOMAINS.index(options.domain))
    tokenizer = load_tokenizer(base_path())
    rows = read_rows(calibration_path(options.domain))[: options.prompts]
    prompts = [row.prompt or "" for row in rows for _ in range(options.answers)]
    seconds: dict[str, float] = {}
    told: dict[str, list[str]] = {}
    with student.generating():
        sample(student.model, tokenizer, prompts[:2], 4)  # warm
        for name, size in (("together", 64), ("alone", 1)):
            begun = time.perf_counter()
            told[name] = sample(student.model, tokenizer, prompts, options.tokens, batch_size=size)
            seconds[name] = round(time.perf_counter() - begun, 2)
    bank.close()
    plan.close()
    same = sum(a == b for a, b in zip(told["together"], told["alone"], strict=True))
    return {"answers": len(prompts), "seconds": seconds, "ratio": round(seconds["alone"] / seconds["together"], 2),
            "same": same}  # fmt: skip


if __name__ == "__main__":
    main()
