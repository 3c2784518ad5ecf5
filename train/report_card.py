"""Writes the report card of a model: frozen rendered samples, answered and scored.

Example:
    python train/report_card.py --model vlmslice/models/nano --num-samples 60
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from vlmslice import Assistant
from vlmslice.evaluation import METRICS, evaluation_samples, predict


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument(
        "--task", choices=METRICS, action="append", help="score this task only; repeatable (default: all)"
    )
    parser.add_argument("--num-samples", type=int, default=300, help="samples per task (default: 300)")
    parser.add_argument("--predictions", type=Path, help="write every answer to this JSONL file")
    parser.add_argument("--output", type=Path, help="write the Markdown table to this file")
    arguments = parser.parse_args()
    assistant = Assistant.from_pretrained(arguments.model)
    lines = ["| task | samples | metric | value | median seconds |", "|---|---|---|---|---|"]
    rows = []
    for task in arguments.task or METRICS:
        name, metric = METRICS[task]
        samples = evaluation_samples(task, arguments.num_samples)
        predictions = predict(assistant, samples, arguments.num_samples)
        rows += map(asdict, predictions)
        seconds = sorted(p.seconds for p in predictions)[len(predictions) // 2]
        lines.append(f"| {task} | {len(predictions)} | {name} | {metric(predictions):.1%} | {seconds:.2f} |")
    table = "\n".join(lines)
    print(table)
    if arguments.predictions:
        arguments.predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if arguments.output:
        arguments.output.write_text(table + "\n")


if __name__ == "__main__":
    main()
