#![no_main]

use std::panic;
use std::sync::Once;

use blockem_fuzz::{mutate, targets};
use libfuzzer_sys::{fuzz_mutator, fuzz_target};

// The tokenizers crate panics on some files, which the library catches: only a panic that comes out
// of the library ends the fuzzer, whose own hook would end it at each.
static HOOK: Once = Once::new();

fuzz_target!(|bytes: &[u8]| {
    HOOK.call_once(|| panic::set_hook(Box::new(|_| {})));
    targets::tokenizer(bytes)
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate::within(data, size, max_size, |bytes| mutate::json(bytes, seed))
});
