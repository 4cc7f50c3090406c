"""The table over versions of torch: medians, ratios of one round, and what only some versions or rounds have."""

from typing import Any

from benchmarks.step.torches import table


def row(version: str, seconds: dict[str, float]) -> dict[str, Any]:
    return {"torch": version, "seconds": seconds}


def test_ratios_are_those_of_one_round_and_what_is_missing_is_said() -> None:
    old = [row("2.7", {"vit_s": s, "vit_s without sdpa": 2 * s, "timm muon": 0.3}) for s in (3.0, 8.0, 4.0)]
    new = [row("2.14", {"vit_s": s, "vit_s without sdpa": 3 * s, "timm muon": 0.3}) for s in (2.0, 2.0, 4.0)]
    for each in new:
        each["seconds"] |= {"torch muon": 0.2, "muon difference": 0.0012}
    old[0]["seconds"] |= {"small": 0.8, "compile start": 30.0, "small compiled": 0.5}
    new[0]["seconds"] |= {"small": 0.8, "compile start": 20.0, "small compiled": 0.4}
    report = {"machine": "A CPU", "commit": "abc", "batch": 8, "note": "", "rounds": list(zip(old, new, strict=True))}
    lines = table(report).splitlines()
    assert "| ViT-S, eager | 4.000 | 2.000 | 1.50 (1.00 to 4.00) |" in lines
    assert "| the same, torch.compile: its first step, compiler included | 30.000 | 20.000 | 1.50 |" in lines
    assert "| torch.optim.Muon, the same | has none | 0.200 | - |" in lines
    assert not any(line.startswith("| ConViT") for line in lines), "not measured"
    assert lines[-2] == (
        "- 2.7: fused attention makes a step 2.00 (2.00 to 2.00) times as fast, the compiler 1.60 times."
    )
    assert lines[-1].endswith(
        "the compiler 2.00 times, torch's Muon is 1.50 (1.50 to 1.50) times as fast as timm's, "
        "whose change of the weights it has within 1.2e-03 of its norm."
    )
