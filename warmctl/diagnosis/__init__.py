"""After the run: what became of warmup, why that is thought, and what to change next time.

In: a History, rows of any logger, or a CSV or JSONL file. Out: a `Diagnosis` of verdict, evidence and advice.
May import: nothing else of the package, and no torch. Every threshold is in `rules.py`.
"""

from warmctl.diagnosis.diagnosis import Diagnosis as Diagnosis, Evidence as Evidence
from warmctl.diagnosis.verdict import diagnose as diagnose, diagnose_command as diagnose_command
