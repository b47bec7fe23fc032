//! Indexes that the standby makes by itself.

use super::{Both, holds, with_repository};
use crate::workloads::pack_and_index;

/// Objects of a pack.
const OBJECTS: u8 = 40;

/// A repack makes one pack of two, and the index of one of them is damaged on the standby.
pub(crate) fn a_damaged_index_makes_no_wrong_one() -> Result<(), String> {
    for damaged in [None, Some("a")] {
        let mut both = with_repository();
        let objects: Vec<(u8, usize)> = (0..OBJECTS).map(|no| (no, 30 + usize::from(no))).collect();
        let (some, others) = objects.split_at(objects.len() / 2);
        write_pack(&both, "a", some);
        write_pack(&both, "b", others);
        both.follow()?;
        if let Some(name) = damaged {
            let index = Both::at(&index_of(name));
            let (first, byte) = (8 + 4 * 256, both.there()[&index_of(name)][8 + 4 * 256 + 3] ^ 1);
            both.copy.write_part(index, first + 3, &[byte]).unwrap();
        }
        write_pack(&both, "c", &objects);
        for name in ["a", "b"] {
            both.active.remove(Both::at(&index_of(name))).unwrap();
            both.active.remove(Both::at(&pack_of(name))).unwrap();
        }
        let outcome = both.follow();
        holds(outcome.is_ok() || damaged.is_some(), &format!("the index is made of those that are there: {outcome:?}"))?;
        if outcome.is_ok() {
            holds(both.there() == both.here(), "G2: an index that isn't the active's is committed")?;
        }
    }
    Ok(())
}

fn pack_of(name: &str) -> String {
    format!("repo/objects/pack/pack-{name}.pack")
}

fn index_of(name: &str) -> String {
    format!("repo/objects/pack/pack-{name}.idx")
}

fn write_pack(both: &Both, name: &str, objects: &[(u8, usize)]) {
    let (pack, index) = pack_and_index(objects);
    both.write(&pack_of(name), &pack);
    both.write(&index_of(name), &index);
}
