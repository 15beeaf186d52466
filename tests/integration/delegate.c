// A TFLite delegate for tests. The option "mode" says what it does: fine (claims nothing), refuse (does not
// come to be), crash (ends the process), zeros (computes the first operator of every graph as zeros).
// Structures as in tensorflow/lite/core/c/common.h, as far as they are read here.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct { int size; int data[]; } Ints;
typedef struct {
  int type; void* data; Ints* dims; float scale; int32_t zero; int allocation_type; size_t bytes;
  void *allocation, *name, *delegate; int buffer_handle; char stale, variable;
  int quantization_type; void *quantization, *sparsity, *dims_signature;
} Tensor;
typedef struct { Ints *inputs, *outputs; } Node;
typedef struct Context Context;
typedef struct Delegate Delegate;
typedef struct {
  void* (*init)(Context*, const char*, size_t);
  void (*release)(Context*, void*);
  int (*prepare)(Context*, Node*);
  int (*invoke)(Context*, Node*);
  void* profiling;
  int32_t builtin_code;
  const char* custom_name;
  int version;
  void *external, *async;
  uint64_t inplace;
} Registration;
struct Context {
  size_t tensors_size;
  int (*execution_plan)(Context*, Ints**);
  Tensor* tensors;
  void *impl, *resize, *report, *add, *node_and_registration;
  int (*replace)(Context*, Registration, const Ints*, Delegate*);
};
struct Delegate {
  void* data;
  int (*prepare)(Context*, Delegate*);
  void *from_buffer, *to_buffer, *free_buffer;
  int64_t flags;
  void* builder;
};

static int zeros(Context* context, Node* node) {
  for (int i = 0; i < node->outputs->size; i++) {
    Tensor* tensor = &context->tensors[node->outputs->data[i]];
    memset(tensor->data, 0, tensor->bytes);
  }
  return 0;
}
static int nothing(Context* context, Node* node) { return 0; }
static int claim_none(Context* context, Delegate* delegate) { return 0; }
static int claim_first(Context* context, Delegate* delegate) {
  Ints* plan;
  if (context->execution_plan(context, &plan)) return 1;
  struct { int size; int first; } one = {1, plan->data[0]};
  Registration kernel = {0};
  kernel.prepare = nothing;
  kernel.invoke = zeros;
  kernel.custom_name = "zeros";
  kernel.version = 1;
  return context->replace(context, kernel, (const Ints*)&one, delegate);
}

Delegate* tflite_plugin_create_delegate(char** keys, char** values, size_t count, void (*report)(const char*)) {
  const char* mode = "fine";
  for (size_t i = 0; i < count; i++)
    if (!strcmp(keys[i], "mode")) mode = values[i];
  if (!strcmp(mode, "crash")) abort();
  if (!strcmp(mode, "refuse")) { report("there is no such device"); return NULL; }
  Delegate* made = calloc(1, sizeof(Delegate));
  made->prepare = strcmp(mode, "zeros") ? claim_none : claim_first;
  return made;
}
void tflite_plugin_destroy_delegate(Delegate* delegate) { free(delegate); }
