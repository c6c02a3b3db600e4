// What the entries of an array are.
#pragma once

namespace isomorph {

enum class Storage { kFloat32, kFloat64, kBFloat16 };

}  // namespace isomorph
