# How test programs of cuda_on_host are built; build.sh calls this. Objects depend on every header they include, by the
# compiler's own lists, and on this file.
out := ../../build/cuda_on_host
compiler := $(if $(shell command -v ccache),ccache) g++
common := -std=c++17 -g -I.. -Wall -Wextra -Werror -Wno-psabi -Wno-unknown-pragmas -ffp-contract=off
runtime := fiber schedule sync shared_memory bulk_copy matrix

plain_flags := -O2
asan_flags := -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
asan_link := $(asan_flags)
race_flags := -O1
# Kernels only: the runtime itself is not watched.
race_kernel := -fno-threadsafe-statics -fsanitize=thread --param tsan-instrument-func-entry-exit=0 -Wno-tsan
race_runtime := clocks race
race_runtime_flags := -O3

.DELETE_ON_ERROR:
.SECONDARY:
.SUFFIXES:

define mode_rules
$(1)/%: $(out)/$(1)/% ;
$(out)/$(1)/%: $(out)/$(1)/%.o $(patsubst %,$(out)/$(1)/runtime/%.o,$(runtime) $($(1)_runtime))
	g++ -no-pie $($(1)_link) $$^ -o $$@
$(out)/$(1)/%.o: tests/%.cpp rules.mk | $(out)/$(1)/runtime
	$(compiler) $(common) $($(1)_flags) $($(1)_kernel) -MMD -MP -c $$< -o $$@
$(out)/$(1)/%.o: conformance/%.cu rules.mk | $(out)/$(1)/runtime
	$(compiler) $(common) $($(1)_flags) $($(1)_kernel) -MMD -MP -x c++ -c $$< -o $$@
$(out)/$(1)/runtime/%.o: %.cpp rules.mk | $(out)/$(1)/runtime
	$(compiler) $(common) $($(1)_flags) $($(1)_runtime_flags) -MMD -MP -c $$< -o $$@
$(out)/$(1)/runtime:
	mkdir -p $$@
endef
$(foreach mode,plain asan race,$(eval $(call mode_rules,$(mode))))

-include $(wildcard $(out)/*/*.d $(out)/*/runtime/*.d)
