/* One of two translation units that include every public header twice; compiled as C and C++. */

#include <blockem.h>
#include <blockem.h>

#include <blockem/dlpack.h>
#include <blockem/dlpack.h>

#ifdef __cplusplus
#include <blockem.hpp>
#include <blockem.hpp>
#endif

#ifdef __cplusplus
extern "C"
#endif
    size_t
    sizes_in_a(void);

size_t sizes_in_a(void) {
  blockem_build_info build = BLOCKEM_BUILD_INFO_INIT;
  blockem_sae_options sae_options = BLOCKEM_SAE_OPTIONS_INIT;
  blockem_sae_desc sae_desc = BLOCKEM_SAE_DESC_INIT;
  blockem_sae_info sae_info = BLOCKEM_SAE_INFO_INIT;
  blockem_latents_desc latents_desc = BLOCKEM_LATENTS_DESC_INIT;
  blockem_latents_info latents_info = BLOCKEM_LATENTS_INFO_INIT;
  blockem_latents_save_options save_options = BLOCKEM_LATENTS_SAVE_OPTIONS_INIT;
  blockem_plan_options plan_options = BLOCKEM_PLAN_OPTIONS_INIT;
  blockem_plan_info plan_info = BLOCKEM_PLAN_INFO_INIT;
  blockem_encode_args encode = BLOCKEM_ENCODE_ARGS_INIT;
  blockem_penalty_args penalty = BLOCKEM_PENALTY_ARGS_INIT;
  blockem_raw_penalty_args raw = BLOCKEM_RAW_PENALTY_ARGS_INIT;
  blockem_cache_options cache_options = BLOCKEM_CACHE_OPTIONS_INIT;
  blockem_cache_info cache_info = BLOCKEM_CACHE_INFO_INIT;
  blockem_mask_options mask_options = BLOCKEM_MASK_OPTIONS_INIT;
  return build.struct_size + sae_options.struct_size + sae_desc.struct_size +
         sae_info.struct_size + latents_desc.struct_size + latents_info.struct_size +
         save_options.struct_size + plan_options.struct_size + plan_info.struct_size +
         encode.struct_size + penalty.struct_size + raw.struct_size + cache_options.struct_size +
         cache_info.struct_size + mask_options.struct_size;
}
