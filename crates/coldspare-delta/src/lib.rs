//! What a changed file costs on the wire: chunk boundaries, digests, pieces, compression.
//!
//! The sender knows what the standby holds, as a [`ChunkList`] of the version sent last. [`FileEncoder`] cuts the new
//! version at boundaries that its content decides, looks each chunk up in the [`Base`] made from that list, and emits
//! [`Segment`]s of literals, copies and zeros. The standby checks a segment and turns it back into writes with [`rebuild`].
//!
//! A pack is never changed in place, but a repack writes the entries of old packs into a new one. [`PackEncoder`] cuts it
//! at its entries, as its index says ([`PackIndexReader`]), and looks each up in [`PackBases`], made from the
//! [`PackTable`] of every pack of the family; [`rebuild_pack`] is its counterpart.
//!
//! A pack's index says nothing that the pack and the names of its objects don't: an [`IndexRecipe`] tells in which index that
//! the standby has each name stands, and [`IndexRebuild`] makes the index anew. The sender knows those indexes by their
//! [`NameTable`].
//!
//! A try that was cut off may have left a part of a file on the standby. [`HeldBlocks`] says which segments that makes
//! needless.
//!
//! A match goes by 16 bytes of BLAKE3 and the length. What was rebuilt is true only once its whole digest was compared;
//! when it differs, the file is sent again without a base.
//!
//! Architecture invariant: this crate is pure. No file, socket, clock, randomness, thread-local or async appears here,
//! and the same input gives the same output on any number of threads. Parallel work runs on the rayon pool of the
//! caller. `clippy.toml` beside this crate's manifest bans the ways around it.

#![forbid(unsafe_code)]

mod block;
mod chunk;
mod compress;
mod digest;
mod encode;
mod fill;
mod index_file;
mod index_names;
mod index_rebuild;
mod index_recipe;
#[cfg(test)]
mod noise;
mod pack_base;
mod pack_encode;
mod pack_entry;
mod pack_index;
mod pack_piece;
mod pack_rebuild;
mod pack_table;
mod piece;
mod rebuild;
mod varint;

pub use block::{BLOCKS_MAX, BlockDigest, BlockHasher, HeldBlocks, block_bytes};
pub use chunk::{Base, CHUNKING_VERSION, CHUNKS_MAX, Chunk, ChunkClass, ChunkList, ChunkListError, ChunkSizes, Follows, UnknownClass};
pub use compress::{Packed, UNPACKED_BYTES_MAX, UnpackError, pack, unpack};
pub use digest::{Hasher, digest, is_zero};
pub use encode::{Chunking, Encoded, FileEncoder, WINDOW_BYTES_MIN};
pub use fill::Segment;
pub use index_file::{INDEX_BYTES_MAX, INDEX_OBJECTS_MAX, IndexFile, IndexFileError};
pub use index_names::{NameBases, NameTable, NameTableError};
pub use index_rebuild::{IndexRebuild, IndexRebuildError, PackWalk, RebuiltIndex};
pub use index_recipe::{IndexRecipe, IndexRecipeError};
pub use pack_base::{PackBases, SOURCES_MAX};
pub use pack_encode::{PackEncoded, PackEncoder};
pub use pack_index::{PackHash, PackIndexError, PackIndexReader, PackOffsets};
pub use pack_piece::{PackPiece, decode_pack_pieces, encode_pack_pieces};
pub use pack_rebuild::{PackWrite, rebuild_pack};
pub use pack_table::{PACK_ENTRIES_MAX, PACK_TABLE_VERSION, PackTable, PackTableError};
pub use piece::{PIECES_MAX, Piece, PieceError, SEGMENT_BYTES_MAX, SEGMENT_SPAN_BYTES_MAX, decode_pieces, encode_pieces};
pub use rebuild::{RebuildError, Write, rebuild};
