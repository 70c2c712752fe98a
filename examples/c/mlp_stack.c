/* Runs the MLPs of a whole model from C, then once more with the strongest neuron of every layer ablated:
 *
 *   mlp_stack model.safetensors [results.f32]
 *
 * Attention and norms are left out. This is not the model but its MLP stack: x = x + mlp(x), layer after layer, on T
 * made-up tokens. The first pass also collects the mean of every neuron. results.f32 gets raw float32: the last layer's
 * x [T, H] of the first pass and of the second, and the means [L, N].
 *
 * bf16 weights are widened to fp32 as they are read: no value changes, and one dtype is enough here. A program with
 * hidden states in bf16 hands the weights to cna_gated_mlp_bf16 as they are. For little-endian machines.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cna.h"

enum { T = 8, N_THREADS = 2 };

typedef struct {
  int64_t L, H, N;
  float *weights; /* [L, 3, N * H]: gate [N, H], up [N, H] and down [H, N] of each layer */
} Model;

typedef struct {
  char name[96];
  long long rows, columns, begin, element; /* begins at byte `begin` of the file, has `element` bytes an element */
} Tensor;

/* A safetensors file begins with the length of its header in 8 bytes; the header is JSON. NULL where there is none. */
static char *read_header(FILE *file, long long file_size) {
  unsigned char bytes[8];
  uint64_t length = 0;
  if (file_size < 8 || fread(bytes, 1, 8, file) != 8) return NULL;
  for (int i = 7; i >= 0; i--) length = length << 8 | bytes[i];
  char *header = length <= (uint64_t)file_size - 8 ? malloc(length + 1) : NULL;
  if (!header) return NULL;
  header[length] = 0;
  if (fread(header, 1, length, file) == length) return header;
  free(header);
  return NULL;
}

/* Look up a layer's weight in a header as the safetensors library writes it: no blanks, keys in this order.
   Returns NULL, or what is wrong. */
static const char *find(Tensor *tensor, const char *header, long long data, long long file_size, int64_t l, int p) {
  static const char *const projections[] = {"gate_proj", "up_proj", "down_proj"};
  char key[100], dtype[16];
  long long end;
  int matched = 0;
  snprintf(tensor->name, sizeof tensor->name, "model.layers.%lld.mlp.%s.weight", (long long)l, projections[p]);
  snprintf(key, sizeof key, "\"%s\":", tensor->name);
  const char *entry = strstr(header, key);
  if (!entry) return "is missing";
  sscanf(entry + strlen(key),
         "{\"dtype\":\"%15[A-Z0-9_]\",\"shape\":[%15lld,%15lld],\"data_offsets\":[%15lld,%15lld]}%n", dtype,
         &tensor->rows, &tensor->columns, &tensor->begin, &end, &matched);
  if (!matched) return "expected a dtype, a shape of two sizes, and data_offsets";
  tensor->element = !strcmp(dtype, "F32") ? 4 : !strcmp(dtype, "BF16") ? 2 : 0;
  if (!tensor->element) return "expected dtype F32 or BF16";
  if (tensor->begin < 0 || tensor->begin > end || end > file_size - data) return "lies outside the file";
  const long long row = (end - tensor->begin) / (tensor->rows > 0 ? tensor->rows : 1); /* bytes */
  if (tensor->rows < 1 || tensor->columns < 1 || tensor->columns != row / tensor->element ||
      end - tensor->begin != tensor->rows * tensor->columns * tensor->element)
    return "data_offsets and shape disagree";
  tensor->begin += data;
  return NULL;
}

static int read_floats(FILE *file, float *to, const Tensor *tensor) {
  if (fseek(file, (long)tensor->begin, SEEK_SET)) return 0;
  for (long long i = 0; i < tensor->rows * tensor->columns; i++) {
    unsigned char bytes[4] = {0}; /* a bf16 is the upper half of a float */
    if (fread(bytes + 4 - tensor->element, (size_t)tensor->element, 1, file) != 1) return 0;
    memcpy(&to[i], bytes, 4);
  }
  return 1;
}

/* Returns 0, or 2 after one line on stderr. */
static int load(Model *model, const char *path) {
  Tensor tensor = {"", 0, 0, 0, 0};
  const char *wrong = NULL;
  FILE *file = fopen(path, "rb");
  if (!file) return perror(path), 2;
  const long long file_size = fseek(file, 0, SEEK_END) ? -1 : ftell(file);
  rewind(file);
  char *header = read_header(file, file_size);
  const long long data = ftell(file);
  for (const char *at = header; at && (at = strstr(at, ".mlp.")); at++) model->L++;
  model->L = (model->L + 2) / 3; /* three weights each; where one is missing, find() says so */
  if (!header)
    wrong = "not a safetensors file, or cut short";
  else if (!model->L)
    wrong = "has no MLP weights";
  for (int64_t i = 0; !wrong && i < 3 * model->L; i++) {
    wrong = find(&tensor, header, data, file_size, i / 3, (int)(i % 3));
    if (wrong) break;
    if (i == 0) {
      model->N = tensor.rows, model->H = tensor.columns;
      model->weights = calloc((size_t)(3 * model->L), (size_t)(model->N * model->H) * sizeof(float));
    }
    const int64_t rows = i % 3 == 2 ? model->H : model->N, columns = i % 3 == 2 ? model->N : model->H;
    if (!model->weights)
      wrong = "no memory";
    else if (tensor.rows != rows || tensor.columns != columns)
      wrong = "shape does not fit the first gate_proj";
    else if (!read_floats(file, model->weights + i * model->N * model->H, &tensor))
      wrong = "cannot be read";
  }
  if (wrong) fprintf(stderr, "%s: %s%s%s\n", path, tensor.name, *tensor.name ? ": " : "", wrong);
  free(header);
  fclose(file);
  return wrong ? 2 : 0;
}

/* hidden [L + 1, T, H]: the tokens come first, and each layer adds its MLP's output to what the layer before has left.
   If mean [L, N] is given, adds the neurons' means to it. If ablated [L] is given, ablates neuron ablated[l] of each
   layer l. Returns a cna_status. */
static int run(const Model *model, float *hidden, float *mean, const int32_t *ablated) {
  const int64_t H = model->H, N = model->N, n_blocks = (N + 1023) / 1024;
  int32_t *offsets = calloc((size_t)n_blocks + 1, sizeof *offsets);
  const int32_t row_circuit[T] = {0}; /* circuit 0 for every token */
  const float zero = 0;
  float token_weight[T];
  int status = offsets ? CNA_OK : CNA_ERR_MEMORY;
  for (int t = 0; t < T; t++) token_weight[t] = 1.0f / T; /* sums with these weights are means */

  for (int64_t l = 0; l < model->L && status == CNA_OK; l++) {
    const float *gate = model->weights + 3 * l * N * H, *up = gate + N * H, *down = up + N * H;
    const float *x = hidden + l * T * H;
    float *y = hidden + (l + 1) * T * H;
    cna_extras extras;
    memset(&extras, 0, sizeof extras);
    extras.version = CNA_ABI_VERSION;
    if (mean) {
      extras.token_weight = token_weight, extras.token_weight_stride = 1, extras.n_columns = 1;
      extras.act_sum = mean + l * N, extras.act_sum_stride = N;
    }
    if (ablated) { /* a circuit of one entry; the offsets say in which block of 1024 neurons it is */
      for (int64_t b = 0; b <= n_blocks; b++) offsets[b] = ablated[l] < 1024 * b;
      extras.row_circuit = row_circuit, extras.offsets = offsets, extras.offsets_stride = n_blocks + 1;
      extras.index = &ablated[l], extras.value = &zero, extras.n_circuits = 1, extras.n_entries = 1;
    }
    status = cna_gated_mlp_fp32(y, x, gate, up, down, &extras, T, H, N, H, H, H, N, N_THREADS);
    for (int64_t i = 0; status == CNA_OK && i < T * H; i++) y[i] += x[i];
  }
  free(offsets);
  return status;
}

/* ||b - a|| / ||a|| */
static double change(const float *a, const float *b, int64_t n) {
  double difference = 0, size = 0;
  for (int64_t i = 0; i < n; i++) difference += pow((double)b[i] - a[i], 2), size += pow(a[i], 2);
  return sqrt(difference / size);
}

static int save(const char *path, const float *plain, const float *steered, int64_t n, const float *mean, int64_t m) {
  FILE *file = fopen(path, "wb");
  if (!file) return perror(path), 2;
  size_t written = fwrite(plain, sizeof(float), (size_t)n, file);
  written += fwrite(steered, sizeof(float), (size_t)n, file);
  written += fwrite(mean, sizeof(float), (size_t)m, file);
  if (fclose(file) || written != (size_t)(2 * n + m)) return perror(path), 2;
  return 0;
}

int main(int argc, char **argv) {
  if (argc < 2 || argc > 3) return fprintf(stderr, "usage: mlp_stack model.safetensors [results.f32]\n"), 2;
  Model model = {0, 0, 0, NULL};
  int exit_code = load(&model, argv[1]);
  if (exit_code) return free(model.weights), exit_code;

  const int64_t L = model.L, N = model.N, n = T * model.H; /* n: the numbers in a layer's x */
  float *plain = calloc((size_t)(L + 1), (size_t)n * sizeof *plain);
  float *steered = calloc((size_t)(L + 1), (size_t)n * sizeof *steered);
  float *mean = calloc((size_t)L, (size_t)N * sizeof *mean);
  int32_t *strongest = calloc((size_t)L, sizeof *strongest);
  int status = plain && steered && mean && strongest ? CNA_OK : CNA_ERR_MEMORY;

  if (status == CNA_OK) { /* tokens in [-1, 1): the upper bits of a product that wraps around */
    for (int64_t i = 0; i < n; i++) plain[i] = steered[i] = (float)((uint32_t)i * 2654435761u >> 16) / 32768 - 1;
    status = run(&model, plain, mean, NULL);
  }
  if (status == CNA_OK) {
    for (int64_t l = 0; l < L; l++)
      for (int64_t i = 1; i < N; i++)
        if (mean[l * N + i] > mean[l * N + strongest[l]]) strongest[l] = (int32_t)i;
    status = run(&model, steered, NULL, strongest);
  }
  if (status == CNA_OK) {
    printf("%lld layers, H = %lld, N = %lld; %d tokens; %s, %s\n", (long long)L, (long long)model.H, (long long)N, T,
           cna_isa(), cna_has_openmp() ? "OpenMP" : "one thread");
    printf("layer  strongest neuron  its mean  x after the layer, strongest ones so far ablated: changed by\n");
    for (int64_t l = 0; l < L; l++)
      printf("%5lld  %16ld  %8.4f  %.2e\n", (long long)l, (long)strongest[l], mean[l * N + strongest[l]],
             change(plain + (l + 1) * n, steered + (l + 1) * n, n));
    if (argc == 3) exit_code = save(argv[2], plain + L * n, steered + L * n, n, mean, L * N);
  } else {
    fprintf(stderr, "mlp_stack: %s\n", cna_status_text(status));
    exit_code = 1;
  }
  free(plain);
  free(steered);
  free(mean);
  free(strongest);
  free(model.weights);
  return exit_code;
}
