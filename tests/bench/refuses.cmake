# Runs PROGRAM with ARGUMENTS, which must be refused: exit code 2, nothing printed but one line.
execute_process(COMMAND ${PROGRAM} ${ARGUMENTS} RESULT_VARIABLE code OUTPUT_VARIABLE out
                ERROR_VARIABLE error)
if(NOT code EQUAL 2 OR NOT out STREQUAL "" OR NOT error MATCHES "^operator_bench: [^\n]+\n$")
  message(FATAL_ERROR "exit code ${code}, output \"${out}\", errors \"${error}\"")
endif()
