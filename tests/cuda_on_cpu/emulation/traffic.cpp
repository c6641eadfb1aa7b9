#include "traffic.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <set>
#include <sstream>
#include <tuple>
#include <vector>

#include "fibers.h"

namespace emulated::traffic {
namespace {

struct Site {
  std::string file;
  int line, bytes;
  Kind kind;
  bool shared;
  bool operator<(const Site& other) const {
    return std::tie(file, line, bytes, kind, shared) <
           std::tie(other.file, other.line, other.bytes, other.kind, other.shared);
  }
};
struct Totals {
  long long bytes = 0, requests = 0, units = 0, min = 0;
};
using Request = std::array<uintptr_t, kWarp>;  // a lane's address; 0 = none

bool counting = false;
std::map<Site, Totals> totals;
// Of the running block: the n-th accesses of a warp's lanes at one site form a request.
std::map<Site, std::map<int, std::vector<Request>>> requests;
std::map<std::pair<Site, int>, int> turns;  // accesses of a thread at a site

void note(const void* address, const Site& site) {
  const int number = thread_number();
  const int turn = turns[{site, number}]++;
  auto& warp = requests[site][number / kWarp];
  if (turn >= static_cast<int>(warp.size())) warp.resize(turn + 1, Request{});
  warp[turn][number % kWarp] = reinterpret_cast<uintptr_t>(address);
}

// Passes over 32 banks of 4 bytes: up to 128 bytes of lanes at a time, one word per bank and pass.
int passes(const Request& request, int bytes) {
  int total = 0;
  const int together = std::max(1, 128 / std::max(bytes, 4));
  for (int first = 0; first < kWarp; first += together) {
    std::array<std::set<uintptr_t>, 32> words;
    for (int lane = first; lane < std::min(kWarp, first + together); ++lane) {
      if (!request[lane]) continue;
      for (int byte = 0; byte < bytes; byte += 4) {
        const uintptr_t word = (request[lane] + byte) / 4;
        words[word % 32].insert(word);
      }
    }
    size_t max = 0;
    for (const auto& bank : words) max = std::max(max, bank.size());
    total += static_cast<int>(max);
  }
  return total;
}

int min_passes(const Request& request, int bytes) {
  int total = 0;
  const int together = std::max(1, 128 / std::max(bytes, 4));
  for (int first = 0; first < kWarp; first += together) {
    bool any = false;
    for (int lane = first; lane < std::min(kWarp, first + together); ++lane) any |= request[lane] != 0;
    total += any;
  }
  return total;
}

}  // namespace

void count(bool on) {
  counting = on;
  if (on) totals.clear();
  requests.clear();
  turns.clear();
}

void global(const void* address, int bytes, Kind kind, const char* file, int line) {
  if (counting) note(address, {file, line, bytes, kind, false});
}

void shared(const void* address, int bytes, Kind kind, const char* file, int line) {
  if (counting) note(address, {file, line, bytes, kind, true});
}

void end_block() {
  if (!counting) return;
  for (const auto& [site, warps] : requests) {
    Totals& sum = totals[site];
    for (const auto& [warp, list] : warps) {
      for (const Request& request : list) {
        std::set<uintptr_t> sectors, words;
        for (uintptr_t address : request) {
          if (!address) continue;
          sum.bytes += site.bytes;
          sectors.insert(address / 32);
          sectors.insert((address + site.bytes - 1) / 32);
          words.insert(address);
        }
        ++sum.requests;
        sum.units += site.shared ? passes(request, site.bytes) : static_cast<int>(sectors.size());
        sum.min +=
            site.shared ? min_passes(request, site.bytes) : static_cast<int>((words.size() * site.bytes + 31) / 32);
      }
    }
  }
  requests.clear();
  turns.clear();
}

std::string report() {
  static const char* names[] = {"load", "store", "matrix", "atomic"};
  std::ostringstream text;
  text << '[';
  bool first = true;
  for (const auto& [site, sum] : totals) {
    const size_t slash = site.file.rfind('/');
    text << (first ? "" : ", ") << "{\"site\": \"" << site.file.substr(slash + 1) << ':' << site.line
         << "\", \"kind\": \"" << names[static_cast<int>(site.kind)] << "\", \"memory\": \""
         << (site.shared ? "shared" : "global") << "\", \"size\": " << site.bytes << ", \"bytes\": " << sum.bytes
         << ", \"requests\": " << sum.requests << ", \"units\": " << sum.units << ", \"min\": " << sum.min << '}';
    first = false;
  }
  text << ']';
  return text.str();
}

}  // namespace emulated::traffic
