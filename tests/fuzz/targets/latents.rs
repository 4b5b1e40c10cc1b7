#![no_main]

use blockem_fuzz::{mutate, targets};
use libfuzzer_sys::{fuzz_mutator, fuzz_target};

fuzz_target!(|bytes: &[u8]| targets::latents(bytes));

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate::within(data, size, max_size, |bytes| mutate::json(bytes, seed))
});
