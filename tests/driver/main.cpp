// Runs csrc/cuda/driver.cpp: every argument is a call, whose result is printed.
//   launch:NAME:GRID:SHARED:STREAM   check   multiprocessors   threads:COUNT:NAME
#include <stdio.h>
#include <stdlib.h>

#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "cuda/driver.h"
#include "cuda/images.h"

namespace rlhf_fast::cuda {
const Arch kArches[] = {{80, 0, false}, {90, 'a', false}, {100, 'f', false}, {120, 0, true}};
const int kArchCount = 4;
const Image kImages[] = {{"first", "one two"}, {"second", "three"}};
const int kImageCount = 2;
const char kArchList[] = "8.0 9.0a 10.0f 12.0+PTX";
const char kToolkit[] = "13.0";
const int kDriverNeeded = 12000;
const char kDriverName[] = "525";
}  // namespace rlhf_fast::cuda

using namespace rlhf_fast::cuda;

int main(int count, char** calls) {
  for (int i = 1; i < count; ++i) {
    std::vector<std::string> words;
    std::stringstream text(calls[i]);
    for (std::string word; std::getline(text, word, ':');) words.push_back(word);
    int argument = 42, code = 0;
    void* arguments[] = {&argument};
    if (words[0] == "launch") {
      const Dim grid{static_cast<unsigned>(atoi(words[2].c_str())), 2, 3};
      void* stream = reinterpret_cast<void*>(strtoull(words[4].c_str(), nullptr, 16));
      code = launch(words[1].c_str(), grid, 256, atoi(words[3].c_str()), stream, arguments);
    } else if (words[0] == "check") {
      code = check();
    } else if (words[0] == "multiprocessors") {
      printf("multiprocessors %d\n", multiprocessors());
    } else {
      std::vector<std::thread> threads;
      for (int t = 0; t < atoi(words[1].c_str()); ++t) {
        threads.emplace_back([&] {
          for (int k = 0; k < 50; ++k) launch(words[2].c_str(), {1, 1, 1}, 32, 0, nullptr, arguments);
        });
      }
      for (auto& thread : threads) thread.join();
    }
    printf("%s -> %s\n", words[0].c_str(), code ? error_text(code) : "ok");
  }
  return 0;
}
