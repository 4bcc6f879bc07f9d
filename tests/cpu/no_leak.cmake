# Fails if OBJECT defines a symbol other than its table of stages.
execute_process(COMMAND ${NM} -C --defined-only --extern-only ${OBJECT}
  OUTPUT_VARIABLE symbols RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "${NM} cannot read ${OBJECT}")
endif()
string(REGEX REPLACE "\n$" "" symbols "${symbols}")
string(REPLACE "\n" ";" lines "${symbols}")
list(LENGTH lines count)
if(NOT count EQUAL 1 OR NOT symbols MATCHES "sla2::cpu::[a-z0-9_]+::kKernels$")
  message(FATAL_ERROR "expected the table kKernels alone, found:\n${symbols}")
endif()
