// The report of bench planner as a table, JSON and a plot.
#include <algorithm>
#include <array>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "comm/bench_planner.h"

namespace switchyard {

std::string BenchPlannerReport::Text() const {
  std::string text = absl::StrFormat(
      "modelled costs: %.2f us to compute 1000 copies of an expert, reading one = %d copies, "
      "moving "
      "one = %d\n%-44s %-5s %10s %10s %7s %9s %6s %9s %9s %9s %s\n",
      static_cast<double>(options.token_ps) * 1e-3, options.t_mem_tokens, options.t_link_tokens,
      "workload", "mode", "tau us", "bound us", "gap %", "max/mean", "floor", "transfers", "p50 us",
      "p99 us", "regime");
  for (const BenchPlannerRow& row : rows) {
    absl::StrAppend(
        &text, absl::StrFormat("%-44s %-5s %10.1f %10.1f %7.1f %9.3f %6.3f %9d %9.2f %9.2f %s",
                               row.workload, BalanceModeName(row.planner), row.tau_us, row.bound_us,
                               row.gap * 100, row.max_mean, row.floor, row.transfers,
                               row.plan_p50_us, row.plan_p99_us, row.regime));
    if (row.recover_steps >= 0) {
      absl::StrAppend(&text, ", after the shift ", row.recover_steps, " steps to recover");
    }
    text += "\n";
  }
  return text;
}

std::string BenchPlannerReport::Json() const {  // all strings are our own: nothing to escape
  std::string json = absl::StrFormat(
      "{\"steps\": %d, \"seed\": %u, \"token_ps\": %d, \"t_mem_tokens\": %d, \"t_link_tokens\": "
      "%d, "
      "\"foreign_slots\": %d, \"unit\": \"us\",\n \"rows\": [",
      options.steps, options.seed, options.token_ps, options.t_mem_tokens, options.t_link_tokens,
      options.foreign_slots);
  const char* separator = "\n";
  for (const BenchPlannerRow& row : rows) {
    absl::StrAppend(
        &json, separator,
        absl::StrFormat("  {\"workload\": \"%s\", \"planner\": \"%s\", \"tau\": %.3f, \"bound\": "
                        "%.3f, \"gap\": "
                        "%.5f, \"max_mean\": %.5f, \"floor\": %.5f, \"transfers\": %d, "
                        "\"transfer_time\": %.3f, "
                        "\"plan_p50_us\": %.3f, \"plan_p99_us\": %.3f, \"regime\": \"%s\"",
                        row.workload, BalanceModeName(row.planner), row.tau_us, row.bound_us,
                        row.gap, row.max_mean, row.floor, row.transfers,
                        static_cast<double>(row.transfers) * row.move_us, row.plan_p50_us,
                        row.plan_p99_us, row.regime));
    if (row.recover_steps >= 0) absl::StrAppend(&json, ", \"recover_steps\": ", row.recover_steps);
    json += "}";
    separator = ",\n";
  }
  return json + "\n ]}";
}

namespace {

struct Panel {
  const char* title;
  double left = 0;  // px
  double (*value)(const BenchPlannerRow&);
};

constexpr double kTop = 50, kHeight = 300, kWidth = 380;
constexpr std::array<std::pair<BalanceMode, const char*>, 4> kColours = {{
    {BalanceMode::kNone, "#888888"},
    {BalanceMode::kEplb, "#d08020"},
    {BalanceMode::kLlep, "#b03050"},
    {BalanceMode::kAuto, "#2060c0"},
}};

std::string DrawPanel(const Panel& panel, const std::vector<const BenchPlannerRow*>& rows) {
  double most = 0, last_skew = 0;
  for (const BenchPlannerRow* row : rows) {
    most = std::max(most, panel.value(*row));
    last_skew = std::max(last_skew, row->skew);
  }
  if (most <= 0 || last_skew <= 0) return "";
  const auto x = [&](double skew) { return panel.left + skew / last_skew * kWidth; };
  const auto y = [&](double value) { return kTop + kHeight * (1 - value / most); };
  std::string svg = absl::StrFormat(
      "<text x='%.0f' y='30' font-weight='bold'>%s</text>"
      "<path d='M%.0f %.0fV%.0fH%.0f' fill='none' stroke='black'/>\n",
      panel.left, panel.title, panel.left, kTop, kTop + kHeight, panel.left + kWidth);
  for (int i = 0; i <= 4; ++i) {
    const double value = most * i / 4;
    absl::StrAppend(&svg, absl::StrFormat("<text x='%.0f' y='%.1f' text-anchor='end'>%.*f</text>"
                                          "<path d='M%.0f %.1fH%.0f' stroke='#dddddd'/>\n",
                                          panel.left - 6, y(value) + 4, most < 100 ? 2 : 0, value,
                                          panel.left, y(value), panel.left + kWidth));
  }
  for (const auto& [mode, colour] : kColours) {
    std::string points;
    for (const BenchPlannerRow* row : rows) {
      if (row->planner != mode) continue;
      absl::StrAppend(&points, absl::StrFormat("%.1f,%.1f ", x(row->skew), y(panel.value(*row))));
      if (mode == BalanceMode::kAuto) {
        absl::StrAppend(
            &svg, absl::StrFormat("<text x='%.1f' y='%.0f' text-anchor='middle'>%.1f</text>\n",
                                  x(row->skew), kTop + kHeight + 18, row->skew));
      }
    }
    absl::StrAppend(&svg, "<polyline fill='none' stroke-width='2' stroke='", colour, "' points='",
                    points, "'/>\n");
  }
  return svg;
}

}  // namespace

std::string BenchPlannerReport::Svg() const {
  std::vector<const BenchPlannerRow*> plotted;
  for (const BenchPlannerRow& row : rows) {
    if (row.skew >= 0) plotted.push_back(&row);
  }
  const double width = 2 * kWidth + 240, height = kTop + kHeight + 80;
  std::string svg = absl::StrFormat(
      "<svg xmlns='http://www.w3.org/2000/svg' width='%.0f' height='%.0f' "
      "font-family='sans-serif' font-size='12'>\n<rect width='100%%' height='100%%' "
      "fill='white'/>\n",
      width, height);
  const Panel panels[] = {{"copies of the fullest rank / mean", 70,
                           [](const BenchPlannerRow& r) { return r.max_mean; }},
                          {"modelled cost of a layer, transfers included (us)", kWidth + 160,
                           [](const BenchPlannerRow& r) { return r.tau_us; }}};
  for (const Panel& panel : panels) svg += DrawPanel(panel, plotted);
  double x = 70;
  for (const auto& [mode, colour] : kColours) {
    absl::StrAppend(
        &svg, absl::StrFormat("<rect x='%.0f' y='%.0f' width='20' height='3' fill='%s'/>"
                              "<text x='%.0f' y='%.0f'>%s</text>\n",
                              x, height - 27, colour, x + 26, height - 20, BalanceModeName(mode)));
    x += 90;
  }
  absl::StrAppend(&svg, absl::StrFormat("<text x='%.0f' y='%.0f'>Zipf exponent of the experts' "
                                        "popularity (64 experts, 8 ranks, 8192 tokens)</text>\n",
                                        x, height - 20));
  return svg + "</svg>\n";
}

}  // namespace switchyard
