//! What keeps a daemon small after much has passed through it.

use std::time::Duration;

/// How often memory that is free is given back.
const EVERY: Duration = Duration::from_secs(30);
/// LIMIT: resident memory from which on it is worth the pause, in bytes.
const WORTHWHILE: u64 = 32 << 20;

/// Gives memory back, for as long as the runtime that this is spawned on runs.
pub(crate) async fn keep_small() {
    loop {
        tokio::time::sleep(EVERY).await;
        if coldspare_os::resident_bytes().0 > WORTHWHILE {
            let _ = tokio::task::spawn_blocking(coldspare_os::release_free_memory).await;
        }
    }
}
