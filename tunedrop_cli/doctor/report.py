"""Prints the findings of `tunedrop doctor` for people."""

from tunedrop_cli.doctor.finding import Finding
from tunedrop_cli.output import console, print_facts


def print_report(name: str, findings: list[Finding]) -> None:
    """Print the findings about the stack `name`: for each, an error or note and its fix."""
    errors = sum(finding.trouble for finding in findings)
    counts = [_count(errors, "error") if errors else "nothing is wrong"]
    if notes := len(findings) - errors:
        counts.append(_count(notes, "note"))
    console.print(f"{name}: {', '.join(counts)}.", style="bold", markup=False)
    for finding in findings:
        facts = [("error" if finding.trouble else "note", f"{finding.code}: {finding.what}")]
        if finding.do:
            facts.append(("fix", finding.do))
        console.print()
        print_facts(facts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
