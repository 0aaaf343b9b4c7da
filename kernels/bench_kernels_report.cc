// The report of bench kernels as a table and as JSON.
#include <cstdio>

#include "kernels/bench_kernels.h"

namespace switchyard {
namespace {

template <typename... Args>
void Append(std::string* text, const char* format, Args... args) {
  char line[512];
  const int length = std::snprintf(line, sizeof(line), format, args...);
  text->append(line, static_cast<size_t>(length));
}

}  // namespace

std::string BenchKernelsReport::Text() const {
  std::string text;
  Append(
      &text,
      "%s, %d threads. Ceilings: FMA %.0f, bf16 dot %.0f, int8 dot %.0f GFLOP/s; read DRAM %.1f, "
      "L2 %.0f GB/s\n",
      numerics_id.c_str(), threads, ceilings.fma_gflops, ceilings.bf16_dot_gflops,
      ceilings.int8_dot_gflops, ceilings.dram_gb_per_s, ceilings.l2_gb_per_s);
  Append(&text, "%-14s %-9s %5s %10s %9s %8s %8s %8s %8s\n", "op", "weights", "rows", "us",
         "GFLOP/s", "of peak", "GB/s", "of read", "oneDNN");
  for (const BenchKernelsRow& row : rows) {
    Append(&text, "%-14s %-9s %5lld %10.1f %9.1f %8.2f %8.1f %8.2f", row.op.c_str(),
           row.format.c_str(), static_cast<long long>(row.rows), row.us, row.gflops,
           row.share_of_compute, row.gb_per_s, row.share_of_probe);
    if (row.onednn_ratio > 0) {
      Append(&text, " %8.2f\n", row.onednn_ratio);
    } else {
      Append(&text, " %8s\n", "-");
    }
  }
  text +=
      "\"of read\" is against a plain read of DRAM (of L2 for cached rows) beside each run; "
      "\"oneDNN\" is its time / ours.\noneDNN's int8 has no scales.";
  if (!onednn_has_bf16)
    text += " It has no bfloat16 for this CPU: its float32 stands there, twice the bytes.";
  return text;
}

std::string BenchKernelsReport::Json() const {  // all strings are our own: nothing to escape
  std::string json;
  Append(&json,
         "{\"numerics_id\": \"%s\", \"threads\": %d, \"onednn_has_bf16\": %s,\n \"ceilings\": "
         "{\"fma_gflops\": %.1f, "
         "\"bf16_dot_gflops\": %.1f, \"int8_dot_gflops\": %.1f, \"dram_gb_per_second\": %.2f, "
         "\"l2_gb_per_second\": %.2f},\n \"rows\": [",
         numerics_id.c_str(), threads, onednn_has_bf16 ? "true" : "false", ceilings.fma_gflops,
         ceilings.bf16_dot_gflops, ceilings.int8_dot_gflops, ceilings.dram_gb_per_s,
         ceilings.l2_gb_per_s);
  const char* separator = "\n";
  for (const BenchKernelsRow& row : rows) {
    Append(&json,
           "%s  {\"op\": \"%s\", \"format\": \"%s\", \"rows\": %lld, \"us\": %.2f, \"gflops\": "
           "%.2f, \"gb_per_second\": %.3f, \"probe_gb_per_second\": %.3f, \"share_of_compute\": "
           "%.4f, \"share_of_probe\": %.4f, \"rounds\": %d",
           separator, row.op.c_str(), row.format.c_str(), static_cast<long long>(row.rows), row.us,
           row.gflops, row.gb_per_s, row.probe_gb_per_s, row.share_of_compute, row.share_of_probe,
           row.rounds);
    if (row.onednn_ratio > 0) Append(&json, ", \"onednn_ratio\": %.4f", row.onednn_ratio);
    json += "}";
    separator = ",\n";
  }
  return json + "\n ]}";
}

}  // namespace switchyard
