"""The measurement of the CPU, in processes whose libraries may use fewer of its instructions."""

import os
import subprocess
import sys


def test_bf16_does_not_pay_where_the_libraries_lack_its_instructions() -> None:
    """A CPU with AVX2 has none: oneDNN converts the numbers of each product. The model's flags stay as they are."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    command = [sys.executable, "-c", "from trainer import cpu; print(cpu.fast_bf16())"]
    assert subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout == "False\n"
