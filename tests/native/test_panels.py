"""The kernels of linears take any number of rows, and cut what they are given themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "native"
COMPILER = os.environ.get("CXX", "g++")
PROGRAM = """
#include <cstdio>
#include <cstring>
#include <vector>

#include "ropewalk/kernels.hpp"
#include "ropewalk/tables.hpp"

using namespace ropewalk;

int main() {
  constexpr int64_t kRows = 3 * kPanelRows + 5, kOut = 2 * kLanes + 3, kTiles = 3;
  std::vector<uint8_t> codes(kTiles * kBlockRows * kLanes / 2);
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(37 * i + 11);
  const std::vector<float> scales(kTiles * kLanes, 0.25f);
  const int32_t starts[] = {0, 1};
  GptqWeights weights{};
  weights.in_features = kBlockRows;
  weights.out_features = kOut;
  weights.num_blocks = weights.num_groups = 1;
  weights.num_tiles = kTiles;
  weights.code_bits = 4;
  weights.scale_type = FloatType::f32;
  weights.codes = codes.data();
  weights.scales = scales.data();
  weights.middle = 8;
  weights.group_starts = starts;
  std::vector<float> x(kRows * kBlockRows), at_once(kRows * kOut), one_by_one(kRows * kOut);
  std::vector<float> row_scales(kRows), row_sums(kRows);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 101) - 50.0f;
  std::vector<int8_t> digits(kRows * kExactDigits * kBlockRows);
  std::vector<int32_t> digit_starts(kRows * kExactDigits);
  const PreparedRows rows{digits.data(), row_scales.data(), digit_starts.data(), row_sums.data()};
  const KernelTable& table = scalar::kernel_table();
  table.prepare({x.data(), kBlockRows, kExactDigits, &weights, rows}, 0, kRows);
  GptqLinearArgs args{&weights, rows, at_once.data(), kOut};
  table.gptq_exact(args, 0, kRows, 0, kTiles);
  args.out = one_by_one.data();
  for (int64_t row = 0; row < kRows; ++row) table.gptq_exact(args, row, row + 1, 0, kTiles);
  const bool same = std::memcmp(at_once.data(), one_by_one.data(), at_once.size() * sizeof(float)) == 0;
  std::puts(same ? "same" : "different");
}
"""


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="the test compiles a program")
def test_a_kernel_takes_more_rows_than_a_panel_holds(tmp_path):
    """With AddressSanitizer, which sees what lies past the prepared rows."""
    (tmp_path / "main.cpp").write_text(PROGRAM)
    sources = [str(tmp_path / "main.cpp"), str(NATIVE / "cpu/scalar/table.cpp")]
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=address", "-fno-omit-frame-pointer"]
    includes = ["-I", str(NATIVE / "include"), "-I", str(NATIVE / "cpu/generic"), "-I", str(NATIVE)]
    subprocess.run([COMPILER, *flags, *includes, *sources, "-o", str(tmp_path / "program")], check=True, timeout=300)
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    run = subprocess.run([str(tmp_path / "program")], capture_output=True, text=True, timeout=60, env=environment)
    assert (run.returncode, run.stdout) == (0, "same\n"), run.stderr[-2000:]
