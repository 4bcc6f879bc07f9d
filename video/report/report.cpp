#include "video/report/report.h"

#include <algorithm>
#include <string_view>

#include <fmt/format.h>

#include "io/files.h"
#include "sla2/error.h"

namespace sla2::video {

using nlohmann::json;

// Written by embed.cmake from template.html.
extern const unsigned char kReportTemplate[];
extern const std::size_t kReportTemplateSize;

namespace {

constexpr std::string_view kMarker = "@SLA2_REPORT_JSON@", kTableMarker = "@SLA2_REPORT_TABLE@";
constexpr std::size_t kMaxVideoBytes = std::size_t{64} << 20;

void need(bool good, const std::string& where, const char* rule, const json& value) {
  if (!good) throw Error(fmt::format("report: {} must be {}, got {}", where, rule, value.dump()));
}

const json& member(const json& object, const char* key, const std::string& where) {
  if (!object.is_object() || !object.contains(key)) {
    throw Error(fmt::format("report: {} must have a member \"{}\", got none", where, key));
  }
  return object.at(key);
}

void need_numbers(const json& object, std::initializer_list<const char*> keys,
                  const std::string& where) {
  for (const char* key : keys) {
    const json& value = member(object, key, where);
    need(value.is_number() || value.is_null(), where + "." + key, "a number or null", value);
  }
}

void check_methods(const json& methods) {
  need(methods.is_array() && !methods.empty(), "methods", "a list that is not empty", methods);
  for (std::size_t i = 0; i < methods.size(); ++i) {
    const std::string where = fmt::format("methods[{}]", i);
    const json& method = member(methods[i], "method", where);
    need(method == "full" || method == "sla2" || method == "sla", where + ".method",
         "full, sla2 or sla", method);
    const json& stage = member(methods[i], "stage", where);
    need(stage == "before" || stage == "calibrated" || stage == "tuned", where + ".stage",
         "before, calibrated or tuned", stage);
    need_numbers(methods[i], {"keep", "val_loss", "psnr_to_full_db", "step_ms"}, where);
  }
}

json read_media(const json& report, const std::filesystem::path& folder) {
  json media = json::object();
  if (report.value("sheet", json()).is_null()) return media;  // latents have no videos
  const std::string file = member(report["sheet"], "file", "sheet").get<std::string>();
  const std::string bytes = io::read_file(folder / file, kMaxVideoBytes);
  media[file] = base64(std::as_bytes(std::span(bytes)));
  return media;
}

std::string escaped(const std::string& text) {
  std::string result;
  for (const char c : text) {
    switch (c) {
      case '<':
        result += "&lt;";
        break;
      case '>':
        result += "&gt;";
        break;
      case '&':
        result += "&amp;";
        break;
      case '"':
        result += "&quot;";
        break;
      default:
        result += c;
    }
  }
  return result;
}

/// The methods as a plain table, for a browser that runs no script.
std::string static_table(const json& methods) {
  std::string rows;
  const auto cell = [](const json& row, const char* key, int digits) {
    const json value = row.value(key, json());
    return value.is_number() ? fmt::format("{:.{}f}", value.get<double>(), digits)
                             : std::string("-");
  };
  for (const json& row : methods) {
    rows += fmt::format("<tr><td>{} {}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
                        escaped(row.at("method").get<std::string>()),
                        escaped(row.at("stage").get<std::string>()), cell(row, "keep", 2),
                        cell(row, "val_loss", 4), cell(row, "psnr_to_full_db", 1),
                        cell(row, "step_ms", 1));
  }
  return "<table><tr><th>Method</th><th>Keep</th><th>Validation loss</th><th>PSNR to full, dB</th>"
         "<th>Step, ms</th></tr>" +
         rows + "</table>";
}

}  // namespace

std::string base64(std::span<const std::byte> bytes) {
  constexpr std::string_view kDigits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  text.reserve((bytes.size() + 2) / 3 * 4);
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    const std::size_t count = std::min<std::size_t>(3, bytes.size() - i);
    unsigned group = 0;
    for (std::size_t j = 0; j < 3; ++j) {
      group = (group << 8) | (j < count ? std::to_integer<unsigned>(bytes[i + j]) : 0U);
    }
    for (std::size_t j = 0; j < 4; ++j) {
      text += j <= count ? kDigits[(group >> (18 - 6 * j)) & 63U] : '=';
    }
  }
  return text;
}

void check_report(const json& report) {
  for (const char* key : {"machine", "versions", "model", "settings", "timing", "losses"}) {
    need(member(report, key, "report").is_object(), key, "an object", report.at(key));
  }
  need(member(report, "command", "report").is_string(), "command", "text", report["command"]);
  check_methods(member(report, "methods", "report"));
  const json& layers = member(report, "layers", "report");
  need(layers.is_array(), "layers", "a list", layers);
  for (std::size_t i = 0; i < layers.size(); ++i) {
    need_numbers(layers[i], {"layer", "keep", "error_before", "error_after"},
                 fmt::format("layers[{}]", i));
  }
  need(member(report, "clips", "report").is_array(), "clips", "a list", report["clips"]);
}

std::string report_page(const json& report, const json& routing,
                        const std::filesystem::path& folder) {
  check_report(report);
  json data = report;
  data["routing"] = routing;
  data["media"] = read_media(report, folder);
  const std::string text =
      data.dump(-1, ' ', /*ensure_ascii=*/true, json::error_handler_t::replace);
  const std::string_view page(reinterpret_cast<const char*>(kReportTemplate), kReportTemplateSize);
  const std::size_t table = page.find(kTableMarker), at = page.find(kMarker);
  if (table == std::string_view::npos || at == std::string_view::npos || table > at) {
    throw Error(ErrorKind::kRuntime, "report: the page's template has no place for the data");
  }
  std::string result(page.substr(0, table));
  result += static_table(report.at("methods"));
  result += page.substr(table + kTableMarker.size(), at - table - kTableMarker.size());
  result.reserve(page.size() + text.size() + 1024);
  // "</script>" inside the data would end the element that holds it.
  for (const char c : text) {
    if (c == '<') {
      result += "\\u003c";
    } else {
      result += c;
    }
  }
  result += page.substr(at + kMarker.size());
  return result;
}

void write_report(const json& report, const json& routing, const std::filesystem::path& folder) {
  const std::string page = report_page(report, routing, folder);
  io::write_file(folder / "report.json", report.dump(1) + "\n");
  io::write_file(folder / "report.html", page);
}

}  // namespace sla2::video
