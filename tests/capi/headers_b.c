/* The other translation unit, in the opposite order. */

#ifdef __cplusplus
#include <blockem.hpp>
#include <blockem.hpp>
#endif

#include <blockem/dlpack.h>

#include <blockem.h>

#include <stdio.h>

#ifdef __cplusplus
extern "C"
#endif
    size_t
    sizes_in_a(void);

int main(void) {
  const blockem_tensor tensor = BLOCKEM_TENSOR_INIT;
  const size_t sizes = sizeof(blockem_build_info) + sizeof(blockem_sae_options) +
                       sizeof(blockem_sae_desc) + sizeof(blockem_sae_info) +
                       sizeof(blockem_latents_desc) + sizeof(blockem_latents_info) +
                       sizeof(blockem_latents_save_options) + sizeof(blockem_plan_options) +
                       sizeof(blockem_plan_info) + sizeof(blockem_encode_args) +
                       sizeof(blockem_penalty_args) + sizeof(blockem_raw_penalty_args) +
                       sizeof(blockem_cache_options) + sizeof(blockem_cache_info) +
                       sizeof(blockem_mask_options);
  const int same = sizes == sizes_in_a() && tensor.data == NULL;
  printf("libblockem %s\n", blockem_version_string());
#ifdef __cplusplus
  return same && blockem::version() == blockem_version_string() ? 0 : 1;
#else
  return same ? 0 : 1;
#endif
}
