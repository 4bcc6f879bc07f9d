# The files that lint checks and format repairs: one list for both. To be sourced.
cpp_sources() { git ls-files -z '*.cpp' '*.h' '*.inc' '*.cu' '*.cuh'; }
python_sources="python tests bench tools"
