// SPDX-License-Identifier: Apache-2.0
#include "emu/report.h"

#include "emu/core.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <sstream>
#include <thread>

namespace emu {
namespace {

long long number(const char* variable, long long otherwise) {
  const char* text = std::getenv(variable);
  return text != nullptr && *text != '\0' ? std::strtoll(text, nullptr, 0) : otherwise;
}

thread_local std::string last_report;

// Frames inside the emulator are not where the kernel's author has to look.
bool is_emulator(const std::string& frame) {
  return frame.find("tests/emulator/emu/") != std::string::npos ||
         frame.find("tests/emulator/include/") != std::string::npos ||
         frame.find("tests/emulator/dilseg/") != std::string::npos ||
         frame.find("/include/c++/") != std::string::npos || frame.find("??") != std::string::npos;
}

// One line of addr2line -Cfpi, "name(args) at file:line", as "file:line in name".
std::string tidy(std::string frame) {
  const std::string inlined = "(inlined by) ";
  if (const size_t at = frame.find(inlined); at != std::string::npos) {
    frame = frame.substr(at + inlined.size());
  }
  const size_t at = frame.rfind(" at ");
  if (at == std::string::npos) {
    return frame;
  }
  std::string name = frame.substr(0, at);
  std::string file = frame.substr(at + 4);
  if (const size_t note = file.find(" (discriminator"); note != std::string::npos) {
    file.resize(note);
  }
  while (file.rfind("./", 0) == 0) {
    file = file.substr(2);
  }
  const std::string anonymous = "(anonymous namespace)::";
  for (size_t found; (found = name.find(anonymous)) != std::string::npos;) {
    name.erase(found, anonymous.size());
  }
  name = name.substr(0, name.find('('));
  return file + " in " + name;
}

}  // namespace

Settings& settings() {
  static Settings current = {
      static_cast<uint64_t>(number("EMULATOR_SEED", 1)),
      static_cast<unsigned>(number(
          "EMULATOR_THREADS", std::max(1u, std::min(16u, std::thread::hardware_concurrency())))),
      static_cast<int>(number("EMULATOR_ARCH", 90)),
      static_cast<unsigned>(number("EMULATOR_SMS", 132)),
      number("EMULATOR_TRUNCATE", 0) != 0,
      number("EMULATOR_UNINITIALISED", 1) != 0};
  return current;
}

void set_report(const std::string& text) { last_report = text; }
const std::string& report() { return last_report; }

std::string format(const char* pattern, ...) {
  va_list arguments;
  va_start(arguments, pattern);
  va_list again;
  va_copy(again, arguments);
  const int length = std::vsnprintf(nullptr, 0, pattern, arguments);
  va_end(arguments);
  std::string text(static_cast<size_t>(length), '\0');
  std::vsnprintf(text.data(), text.size() + 1, pattern, again);
  va_end(again);
  return text;
}

std::string describe_pc(Pc pc) {
  Dl_info info;
  if (pc == nullptr || dladdr(pc, &info) == 0 || info.dli_fname == nullptr) {
    return format("%p", pc);
  }
  // The return address is behind the call; one byte back lies in it.
  const auto offset = static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase) - 1;
  const std::string command =
      format("LD_PRELOAD= addr2line -Cfpie '%s' %#tx 2>/dev/null", info.dli_fname, offset);
  std::string frames;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    char buffer[512];
    while (std::fgets(buffer, sizeof buffer, pipe) != nullptr) {
      frames += buffer;
    }
    pclose(pipe);
  }
  std::istringstream lines(frames);
  std::string frame, first;
  while (std::getline(lines, frame)) {
    if (frame.empty()) {
      continue;
    }
    if (!is_emulator(frame)) {
      return tidy(frame);
    }
    if (first.empty()) {
      first = frame;
    }
  }
  return first.empty() || first.find("??") != std::string::npos ? format("%p", pc) : tidy(first);
}

std::string where(const Thread& thread) {
  const Index3& b = thread.cta->index;
  return format("thread %u of block (%u,%u,%u)", thread.linear, b.x, b.y, b.z);
}

}  // namespace emu
