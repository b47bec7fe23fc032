//! Goes on inside a large file that an interrupted try left on the standby in part.
//!
//! The standby tells the digests of the blocks that it has; what is the same here isn't sent. That the file may change
//! between this comparison and its reading costs nothing but time: the whole has a digest.

use coldspare_core::{RelPath, RootId};
use coldspare_delta::{BlockDigest, BlockHasher, HeldBlocks, Piece, encode_pieces};
use coldspare_os::Disk;

use crate::inspect::Inspect;
use crate::read::{Opened, Stop};
use crate::run::Run;

impl<D: Disk> Run<'_, D> {
    /// What the standby has of a file as it is here; `there` are the digests of its blocks.
    ///
    /// Cost: all of the file is read and hashed.
    pub(crate) fn held_blocks(&self, file: &Opened<'_, D>, there: &[BlockDigest]) -> std::io::Result<HeldBlocks> {
        let mut hasher = BlockHasher::new(file.before.size);
        self.windows(file, &mut Inspect::Nothing.begin(), |window, _| {
            hasher.update(window);
            Some(window.len())
        })?;
        let held = HeldBlocks::new(file.before.size, &hasher.finish(), there);
        tracing::info!(path = %file.path, bytes = held.bytes(), of = file.before.size, "the standby has a part of a file");
        Ok(held)
    }

    /// Hands over a part of a large file, of `len` bytes at `offset`: as `part` and `literal`, or as what the standby has.
    pub(crate) fn send_unless_held(
        &self,
        file: &Opened<'_, D>,
        number: u32,
        (offset, len): (u64, u64),
        held: Option<&HeldBlocks>,
        part: impl FnOnce() -> (Vec<(RootId, RelPath)>, Vec<u8>),
        literal: Vec<u8>,
    ) -> Result<(), Stop> {
        if held.is_none_or(|held| !held.cover(offset, len)) {
            return self.send_part(file, number, offset, part(), literal);
        }
        let len = u32::try_from(len).expect("a segment keeps its limits");
        self.send_part(file, number, offset, (Vec::new(), encode_pieces(&[Piece::Held { len }])), Vec::new())
    }
}
