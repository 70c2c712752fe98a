/* Loads the arrays of a small MLP, runs it with sums and a circuit, and checks the result: `make -C csrc example`.
 * example.f32 holds inputs and expected results as raw float32; example_data.py wrote it from the definition. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cna.h"

enum { T = 3, H = 16, N = 48, C = 2 };

static void load(FILE *file, float *array, size_t n) {
  if (fread(array, sizeof(float), n, file) != n) {
    fprintf(stderr, "example.f32: too short\n");
    exit(2);
  }
}

static float worst(const float *got, const float *wanted, int n) {
  float largest = 0;
  for (int i = 0; i < n; i++)
    if (!(fabsf(got[i] - wanted[i]) <= largest)) largest = fabsf(got[i] - wanted[i]); /* NaN is worst, too */
  return largest;
}

int main(int argc, char **argv) {
  static float x[T * H], w_gate_up[2 * N * H], w_down[H * N], token_weight[T * C], act_sum[C * N], y[T * H];
  static float expected_y[T * H], expected_sum[C * N];
  FILE *file = fopen(argc > 1 ? argv[1] : "example.f32", "rb");
  if (!file) return perror("example.f32"), 2;
  load(file, x, T * H);
  load(file, w_gate_up, 2 * N * H);
  load(file, w_down, H * N);
  load(file, token_weight, T * C);
  load(file, act_sum, C * N);
  load(file, expected_y, T * H);
  load(file, expected_sum, C * N);
  fclose(file);

  /* One circuit: neuron 5 is ablated, neuron 40 doubled. Tokens 0 and 2 use it, token 1 uses none. */
  const int32_t offsets[] = {0, 2}, index[] = {5, 40}, row_circuit[T] = {0, -1, 0};
  const float value[] = {0.0f, 2.0f};
  cna_extras extras;
  memset(&extras, 0, sizeof extras);
  extras.version = CNA_ABI_VERSION;
  extras.token_weight = token_weight, extras.token_weight_stride = C, extras.n_columns = C;
  extras.act_sum = act_sum, extras.act_sum_stride = N;
  extras.row_circuit = row_circuit, extras.offsets = offsets, extras.offsets_stride = 2;
  extras.index = index, extras.value = value, extras.n_circuits = 1, extras.n_entries = 2;

  const float *w_gate = w_gate_up, *w_up = w_gate_up + N * H;
  const int status = cna_gated_mlp_fp32(y, x, w_gate, w_up, w_down, &extras, T, H, N, H, H, H, N, 2);
  if (status != CNA_OK) return fprintf(stderr, "cna_gated_mlp_fp32: %s\n", cna_status_text(status)), 1;

  const float error_y = worst(y, expected_y, T * H), error_sum = worst(act_sum, expected_sum, C * N);
  const int passed = error_y < 2e-4f && error_sum < 2e-5f; /* y is up to 400, act_sum up to 50 */
  printf("%s, %s: worst error y %.1e, act_sum %.1e: %s\n", cna_isa(), cna_has_openmp() ? "OpenMP" : "one thread",
         error_y, error_sum, passed ? "passed" : "FAILED");
  return passed ? 0 : 1;
}
