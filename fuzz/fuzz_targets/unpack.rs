//! Compressed contents from a peer: exactly the announced length or an error.
//!
//! The first two bytes are the announced length; the decompressor itself is C and not instrumented.

#![no_main]

use coldspare_delta::unpack;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((announced, frame)) = bytes.split_first_chunk() else { return };
    let announced = usize::from(u16::from_le_bytes(*announced));
    for frame in [frame, &[&[0x28, 0xb5, 0x2f, 0xfd], frame].concat()] {
        if let Ok(raw) = unpack(frame, announced) {
            assert_eq!(raw.len(), announced);
        }
    }
});
