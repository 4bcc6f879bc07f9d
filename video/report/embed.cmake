# Puts a file into a C++ source as one array: cmake -DINPUT=... -DOUTPUT=... -P embed.cmake. An array
# of numbers has no limit on length, a string literal has.
file(READ ${INPUT} bytes HEX)
string(REGEX REPLACE "([0-9a-f][0-9a-f])" "0x\\1," bytes "${bytes}")
string(REGEX REPLACE "((0x..,)(0x..,)(0x..,)(0x..,)(0x..,)(0x..,)(0x..,)(0x..,))" "\\1\n" bytes "${bytes}")
file(WRITE ${OUTPUT} "#include <cstddef>\n\nnamespace sla2::video {\n"
  "extern const unsigned char kReportTemplate[];\nextern const std::size_t kReportTemplateSize;\n"
  "const unsigned char kReportTemplate[] = {\n${bytes}};\n"
  "const std::size_t kReportTemplateSize = sizeof(kReportTemplate);\n}  // namespace sla2::video\n")
