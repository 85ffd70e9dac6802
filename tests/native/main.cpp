// Runs one check: kernels_test NAME. Without arguments: lists the checks. `cgroup FOLDER` prints the CPU limit read from
// the files under a folder. Built with AddressSanitizer and UndefinedBehaviorSanitizer by tests/test_kernels.py.
#include "check.h"

int main(int argc, char **argv) {
  const std::string wish = argc > 1 ? argv[1] : "";
  if (wish == "cgroup") {
    std::printf("%d\n", mimo::cgroup_cpu_limit(argc > 2 ? argv[2] : ""));
    return 0;
  }
  const auto check = checks().find(wish);
  if (check == checks().end()) {
    for (const auto &[name, function] : checks()) std::printf("%s\n", name.c_str());
    return 2;
  }
  check->second();
  return 0;
}
