// SPDX-License-Identifier: MIT
// Draws the heat map and the bars as SVG.
#include "picture.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <fstream>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <string>

namespace moe {
namespace {

constexpr double kMiB = 1 << 20;
constexpr double kWidth = 860;
constexpr double kHeight = 970;
constexpr double kMapLeft = 130;
constexpr double kMapTop = 150;
constexpr double kMapSize = 520;
constexpr double kBarsTop = 790;
constexpr double kBarsHeight = 110;

struct Colour {
  double r, g, b;
};

/// Pale to deep blue; lightness falls evenly, so that it also reads in grey.
constexpr std::array<Colour, 5> kScale = {
    {{247, 251, 255}, {198, 219, 239}, {107, 174, 214}, {33, 113, 181}, {8, 48, 107}}};
constexpr const char* kInk = "#1f2933";
constexpr const char* kFaint = "#66727f";
constexpr std::array<const char*, 2> kNodeColours = {"#2171b5", "#d9822b"};  // of neighbouring nodes, in turn

std::string colour_at(double share) {
  const double place = std::clamp(share, 0.0, 1.0) * (kScale.size() - 1);
  const auto below = std::min(static_cast<std::size_t>(place), kScale.size() - 2);
  const double part = place - static_cast<double>(below);
  const auto mix = [&](double a, double b) { return static_cast<int>(std::lround(a + (b - a) * part)); };
  const Colour& a = kScale[below];
  const Colour& b = kScale[below + 1];
  return fmt::format("#{:02x}{:02x}{:02x}", mix(a.r, b.r), mix(a.g, b.g), mix(a.b, b.b));
}

/// The first round number (its fifths and halves are round as well) that is not below `value`.
double round_up(double value) {
  if (value <= 0) return 1;
  const double power = std::pow(10.0, std::floor(std::log10(value)));
  for (const double step : {1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0}) {
    if (value <= step * power * (1 + 1e-9)) return step * power;
  }
  return 10 * power;
}

/// Collects elements; knows nothing of what they show.
class Svg {
 public:
  void rect(double x, double y, double width, double height, const std::string& style) {
    add("<rect x=\"{:.2f}\" y=\"{:.2f}\" width=\"{:.2f}\" height=\"{:.2f}\" {}/>\n", x, y, width, height, style);
  }
  void line(double x1, double y1, double x2, double y2, const std::string& style) {
    add("<line x1=\"{:.2f}\" y1=\"{:.2f}\" x2=\"{:.2f}\" y2=\"{:.2f}\" {}/>\n", x1, y1, x2, y2, style);
  }
  void text(double x, double y, const std::string& words, const std::string& style) {
    add("<text x=\"{:.2f}\" y=\"{:.2f}\" {}>{}</text>\n", x, y, style, words);
  }
  /// Reads upwards, centred on the point.
  void text_upwards(double x, double y, const std::string& words, const std::string& style) {
    text(x, y, words, fmt::format("text-anchor=\"middle\" transform=\"rotate(-90 {:.2f} {:.2f})\" {}", x, y, style));
  }
  void begin_group(const std::string& attributes) { add("<g {}>\n", attributes); }
  void end_group() { body_ += "</g>\n"; }
  const std::string& body() const { return body_; }

 private:
  template <typename... Args>
  void add(fmt::format_string<Args...> format, Args&&... args) {
    fmt::format_to(std::back_inserter(body_), format, std::forward<Args>(args)...);
  }
  std::string body_;
};

std::string font(int size, const char* colour, const char* more = "") {
  return fmt::format("font-size=\"{}\" fill=\"{}\" {}", size, colour, more);
}

void draw_title(Svg& svg, const Report& report) {
  const Settings& s = report.settings;
  svg.text(kMapLeft, 42, "Dispatch traffic between ranks", font(24, kInk, "font-weight=\"bold\""));
  svg.text(kMapLeft, 66,
           fmt::format("{} tokens, hidden {} in BF16, top-{} of {} experts, {} of {} groups per token",
                       report.tokens_in_all(), s.hidden, s.topk, s.experts, s.topk_groups, s.groups),
           font(14, kFaint));
  svg.text(
      kMapLeft, 86,
      fmt::format("{:.1f} MiB in all, {:.0f} % across nodes; a token goes to {:.2f} ranks ({:.2f} without group limit)",
                  report.bytes_in_all() / kMiB,
                  report.bytes_in_all() > 0 ? 100 * report.bytes_across_nodes() / report.bytes_in_all() : 0,
                  report.limited.ranks, report.free.ranks),
      font(14, kFaint));
}

/// Three digits, or two behind the point.
std::string short_number(double value) {
  if (value < 10) return fmt::format("{:.2f}", value);
  return value < 100 ? fmt::format("{:.1f}", value) : fmt::format("{:.0f}", value);
}

void draw_cells(Svg& svg, const Report& report, const Unit& unit, double top_value) {
  const int ranks = report.settings.ranks;
  const double cell = kMapSize / ranks;
  const bool with_numbers = ranks <= 16;
  const int size = std::clamp(static_cast<int>(cell * 0.24), 9, 15);
  for (int from = 0; from < ranks; ++from) {
    for (int to = 0; to < ranks; ++to) {
      const double amount = report.bytes_between(from, to) / unit.bytes;
      const double x = kMapLeft + to * cell;
      const double y = kMapTop + from * cell;
      svg.rect(x, y, cell, cell,
               fmt::format("fill=\"{}\" stroke=\"#ffffff\" stroke-width=\"1\"", colour_at(amount / top_value)));
      if (!with_numbers) continue;
      svg.text(x + cell / 2, y + cell / 2 + size * 0.36, short_number(amount),
               font(size, amount / top_value > 0.55 ? "#ffffff" : kInk, "text-anchor=\"middle\""));
    }
  }
}

void draw_rank_names(Svg& svg, int ranks) {
  const double cell = kMapSize / ranks;
  const int every = ranks <= 32 ? 1 : 4;
  for (int r = 0; r < ranks; r += every) {
    const double middle = (r + 0.5) * cell;
    svg.text(kMapLeft + middle, kMapTop + kMapSize + 20, std::to_string(r), font(14, kInk, "text-anchor=\"middle\""));
    svg.text(kMapLeft - 10, kMapTop + middle + 5, std::to_string(r), font(14, kInk, "text-anchor=\"end\""));
  }
  svg.text(kMapLeft + kMapSize / 2, kMapTop + kMapSize + 44, "to rank", font(15, kInk, "text-anchor=\"middle\""));
  svg.text_upwards(kMapLeft - 78, kMapTop + kMapSize / 2, "from rank", font(15, kInk));
}

void draw_nodes(Svg& svg, const Settings& settings) {
  const double cell = kMapSize / settings.ranks;
  for (int node = 0; node < settings.num_nodes(); ++node) {
    const double first = node * settings.ranks_per_node * cell;
    const double last = std::min(settings.ranks, (node + 1) * settings.ranks_per_node) * cell;
    const char* colour = kNodeColours[node % kNodeColours.size()];
    const std::string stroke = fmt::format("stroke=\"{}\" stroke-width=\"4\"", colour);
    svg.line(kMapLeft + first + 3, kMapTop - 10, kMapLeft + last - 3, kMapTop - 10, stroke);
    svg.line(kMapLeft - 46, kMapTop + first + 3, kMapLeft - 46, kMapTop + last - 3, stroke);
    const std::string style = font(14, colour, "font-weight=\"bold\"");
    svg.text((kMapLeft * 2 + first + last) / 2, kMapTop - 20, fmt::format("node {}", node),
             style + " text-anchor=\"middle\"");
    svg.text_upwards(kMapLeft - 54, kMapTop + (first + last) / 2, fmt::format("node {}", node), style);
    if (node == 0) continue;
    const std::string border = fmt::format("stroke=\"{}\" stroke-width=\"3\"", kInk);
    svg.line(kMapLeft + first, kMapTop, kMapLeft + first, kMapTop + kMapSize, border);
    svg.line(kMapLeft, kMapTop + first, kMapLeft + kMapSize, kMapTop + first, border);
  }
  svg.rect(kMapLeft, kMapTop, kMapSize, kMapSize, fmt::format("fill=\"none\" stroke=\"{}\" stroke-width=\"3\"", kInk));
}

void draw_colour_scale(Svg& svg, const Unit& unit, double top_value) {
  constexpr double kLeft = kMapLeft + kMapSize + 40;
  constexpr double kBarWidth = 24;
  constexpr int kSteps = 130;
  constexpr double kStep = kMapSize / kSteps;
  for (int i = 0; i < kSteps; ++i) {
    // Half a unit taller than its place, or hairlines would show between the steps.
    svg.rect(kLeft, kMapTop + kMapSize - (i + 1) * kStep, kBarWidth, kStep + (i > 0 ? 0.5 : 0),
             fmt::format("fill=\"{}\"", colour_at((i + 0.5) / kSteps)));
  }
  svg.rect(kLeft, kMapTop, kBarWidth, kMapSize, fmt::format("fill=\"none\" stroke=\"{}\"", kFaint));
  for (int tick = 0; tick <= 5; ++tick) {
    const double y = kMapTop + kMapSize * (1 - tick / 5.0);
    svg.line(kLeft + kBarWidth, y, kLeft + kBarWidth + 6, y, fmt::format("stroke=\"{}\"", kFaint));
    svg.text(kLeft + kBarWidth + 11, y + 5, fmt::format("{:g}", top_value * tick / 5), font(14, kInk));
  }
  svg.text_upwards(kLeft + kBarWidth + 70, kMapTop + kMapSize / 2,
                   fmt::format("{} from one rank to another", unit.name), font(15, kInk));
}

void draw_bar_axes(Svg& svg, const Report& report, double top) {
  svg.text(kMapLeft, kBarsTop - 20,
           fmt::format("Rows per expert: the largest is {:.2f} times the mean ({:.2f} without the router's bias)",
                       report.expert_imbalance, report.imbalance_without_bias),
           font(15, kInk));
  svg.text_upwards(kMapLeft - 78, kBarsTop + kBarsHeight / 2, "rows", font(15, kInk));
  svg.text(kMapLeft + kMapSize / 2, kBarsTop + kBarsHeight + 44, "experts, by the rank that hosts them",
           font(15, kInk, "text-anchor=\"middle\""));
  for (int tick = 0; tick <= 2; ++tick) {
    const double y = kBarsTop + kBarsHeight * (1 - tick / 2.0);
    svg.line(kMapLeft, y, kMapLeft + kMapSize, y, fmt::format("stroke=\"{}\"", tick == 0 ? kFaint : "#d8dee4"));
    svg.text(kMapLeft - 10, y + 5, fmt::format("{:g}", top * tick / 2), font(14, kInk, "text-anchor=\"end\""));
  }
}

void draw_bars(Svg& svg, const Report& report, double top) {
  const double width = kMapSize / static_cast<double>(report.expert_rows.size());
  const double gap = width > 4 ? 1.5 : 0;
  int expert = 0;
  for (int r = 0; r < report.settings.ranks; ++r) {
    const double middle = kMapLeft + (expert + report.slots[r] / 2.0) * width;
    if (report.settings.ranks <= 32) {
      svg.text(middle, kBarsTop + kBarsHeight + 20, std::to_string(r), font(14, kInk, "text-anchor=\"middle\""));
    }
    // Neighbouring ranks of a node differ in shade.
    const char* colour = kNodeColours[report.settings.node_of(r) % kNodeColours.size()];
    const std::string fill = fmt::format("fill=\"{}\" fill-opacity=\"{}\"", colour, r % 2 == 0 ? 1.0 : 0.6);
    for (int i = 0; i < report.slots[r]; ++i, ++expert) {
      const double height = kBarsHeight * report.expert_rows[expert] / top;
      svg.rect(kMapLeft + expert * width + gap / 2, kBarsTop + kBarsHeight - height, width - gap, height, fill);
    }
  }
}

void draw_experts(Svg& svg, const Report& report) {
  const double top = round_up(*std::max_element(report.expert_rows.begin(), report.expert_rows.end()));
  draw_bar_axes(svg, report, top);
  draw_bars(svg, report, top);
  const double sum = std::accumulate(report.expert_rows.begin(), report.expert_rows.end(), 0.0);
  const double mean = sum / static_cast<double>(report.expert_rows.size());
  const double y = kBarsTop + kBarsHeight * (1 - mean / top);
  svg.line(kMapLeft, y, kMapLeft + kMapSize, y,
           fmt::format("stroke=\"{}\" stroke-width=\"1.5\" stroke-dasharray=\"6 4\"", kInk));
  svg.text(kMapLeft + kMapSize + 8, y + 5, fmt::format("mean {:.0f}", mean), font(14, kInk));
}

}  // namespace

void write_picture(const Report& report, const std::filesystem::path& file) {
  const Unit unit = unit_for(report.most_bytes_between());
  const double top_value = round_up(report.most_bytes_between() / unit.bytes);
  Svg svg;
  svg.begin_group("font-family=\"DejaVu Sans, Helvetica, Arial, sans-serif\"");
  svg.rect(0, 0, kWidth, kHeight, "fill=\"#ffffff\"");
  draw_title(svg, report);
  draw_cells(svg, report, unit, top_value);
  draw_nodes(svg, report.settings);
  draw_rank_names(svg, report.settings.ranks);
  draw_colour_scale(svg, unit, top_value);
  draw_experts(svg, report);
  svg.end_group();

  std::ofstream out(file);
  out << fmt::format(
             "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0:g} {1:g}\" width=\"{0:g}\" "
             "height=\"{1:g}\">\n",
             kWidth, kHeight)
      << svg.body() << "</svg>\n";
  if (!out.flush()) throw std::runtime_error(fmt::format("cannot write {}", file.string()));
}

}  // namespace moe
