// Everything a user of the C++ library includes.
#pragma once

#include "sla2/attention.h"
#include "sla2/config.h"
#include "sla2/error.h"
#include "sla2/executor.h"
#include "sla2/implementation.h"
#include "sla2/problem.h"
#include "sla2/self_test.h"
#include "sla2/tensor.h"
#include "sla2/workspace.h"
