//! The index of a host that was a standby until now: what its manifest says of the home, so that nothing is read again.

use coldspare_core::control::ControlRecord;
use coldspare_scan::index::Index;
use coldspare_scan::inherit::Heir;
use coldspare_standby::StandbyError;

use super::index_failure;
use crate::config::Config;
use crate::exit::Failure;
use crate::seal::Ways;
use crate::standby::open_copy;
use crate::state::State;

/// Makes the index of the manifest where there is one and no index; the manifest, of a tree that goes its own way from now
/// on, is removed once the index is durable.
///
/// Cost: one `statx` an entry.
///
/// # Errors
/// `Usage`, `Damage`: the stores can't be used.
pub(super) fn inherit_index(config: &Config, state: &State, record: &ControlRecord) -> Result<(), Failure> {
    let (from, to) = (state.manifest_path(), state.index_path());
    if !from.exists() {
        return Ok(());
    }
    if !to.exists() {
        let copy = open_copy(config, state, record, &Ways::default())?;
        let until_ms = state.note("promoted").and_then(|text| text.parse().ok()).unwrap_or(0);
        if let Some(applied) = copy.applied() {
            tracing::info!(seq = applied.seq.0, "the index is made of what the standby knew");
            let temporary = to.with_extension("redb.new");
            state.remove_store(&temporary)?;
            let index = Index::open(&temporary).map_err(index_failure)?;
            let mut heir = Heir::new(&index, applied.seq, until_ms);
            let mut failed = Ok(());
            copy.for_each_sound(|root, path, entry, stat| {
                if failed.is_ok() {
                    failed = heir.add(root, &path, entry, &stat);
                }
                Ok::<(), StandbyError>(())
            })
            .map_err(Failure::damage)?;
            failed.and_then(|()| heir.finish()).map_err(index_failure)?;
            drop(index);
            std::fs::rename(&temporary, &to).map_err(|e| Failure::damage(format!("{}: can't be made: {e}", to.display())))?;
        }
    }
    state.remove_store(&from)
}
