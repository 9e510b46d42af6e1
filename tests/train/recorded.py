"""Write the folders that runs leave, without a run."""

from __future__ import annotations

import json

import yaml

HOSTILE = [
    "<script>window.hostile = 1; document.title = 'hostile'</script>",
    "</script><img src=x onerror='window.hostile = 2'>",
    "\"><svg onload='window.hostile = 3'></svg>",
    "'--><!--<iframe src='https://example.com/'></iframe>",
    "<style>* { display: none }</style><link rel=stylesheet href=https://example.com/a.css>",
    "</div></article></main><h1>outside</h1>",
    "\u202eright to left\u2066 never ended, \u0000\u0007\u001b[31m\u0085\ufeff\uffff",
    "&lt;b&gt; &amp; ${window.hostile = 4} {{7*7}} javascript:window.hostile=5",
    "long" * 500,
    "مرحبا بالعالم <b>bold</b> שלום 👩‍👩‍👧",
    "a\u0301" + "\u0301" * 60,
]


def write_run(folder, *, steps=20, algorithm="hypo", offset=0.0, texts=(), config=None, ended="finished"):
    """Write a run of ``steps`` steps with evaluations at half of them and at the end; ``texts`` are its samples."""
    (folder / "samples").mkdir(parents=True)
    settings = {"algorithm": algorithm, "model_name_or_path": "models/Small", "dataset_name": "data/pairs.jsonl"}
    settings |= {"learning_rate": 1e-6, "beta": 0.1, **(config or {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, allow_unicode=False), encoding="utf-8")
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "loss": 0.7 - 0.01 * step + offset, "kl": 0.5 * step + offset, "kl_se": 0.1}
        line |= {"rewards/accuracies": 0.6, "rewards/margins": 0.1 * step, "learning_rate": 1e-6, "epoch": step / steps}
        line |= {"rewards/chosen": 0.05 * step, "rewards/rejected": -0.05 * step, "tokens_per_second": 1e4}
        line |= {"time/forward": 0.1, "time/backward": 0.2, "time/step": 0.3, "memory/peak_gb": 1.5}
        lines.append(line)
        if step in (steps // 2, steps):
            figures = {"eval_loss": 0.65, "eval_kl": 0.5 * step, "eval_kl_se": 0.21, "eval_rewards/accuracies": 0.7}
            lines.append({"step": step, **figures})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    attempt = {"started": "2026-01-01 00:00:00 UTC", "first_step": 0, "total_steps": steps, "ended": ended}
    attempt |= {"seconds": 12.5 if ended else None, "device": "cpu: a processor", "torch": "2.13.0"}
    (folder / "environment.json").write_text(json.dumps({"attempts": [attempt]}))
    samples = [
        {"row": row, "prompt": f"{text} ?", "completion": text, "reference": f"{text} !", "length": 5, "ended": row > 0}
        | {"kl": 1.5 + row, "reward": -0.25}
        for row, text in enumerate(texts or ["one thing", "another one"])
    ]
    # JSON in ASCII can hold lone surrogates, which UTF-8 cannot.
    (folder / "samples" / f"step-{steps}.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    return folder
