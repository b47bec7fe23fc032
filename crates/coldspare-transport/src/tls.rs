//! TLS between pinned keys: version 1.3 only, raw public keys on both sides (RFC 7250), nothing resumed.
//!
//! Decides how a host proves its key and what it demands of the other. It knows no address and no policy.
//!
//! Invariants: both sides prove possession of an Ed25519 key; the active talks to a pinned standby or to nobody; no
//! 0-RTT, no tickets, no resumption, no certificate chains.

use std::sync::{Arc, OnceLock};

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::AlwaysResolvesServerRawPublicKeys;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use rustls::{ClientConfig, DigitallySignedStruct, DistinguishedName, Error, ServerConfig, SignatureScheme};

use crate::ALPN;
use crate::identity::{Identity, PeerKey};

/// The standby's side: any Ed25519 key is let in as far as the caller's own check of it.
pub(crate) fn standby_config(identity: &Identity) -> QuicServerConfig {
    let provider = provider();
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider speaks TLS 1.3")
        .with_client_cert_verifier(Arc::new(AnyKey { proof: Proof::new(&provider) }))
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(certified(identity, &provider))));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    config.try_into().expect("the provider has the cipher suite of QUIC's first packets")
}

/// The active's side: only a key of `pinned` is talked to; the caller keeps `pinned` to learn what was refused.
pub(crate) fn active_config(identity: &Identity, pinned: Arc<Pinned>) -> QuicClientConfig {
    let provider = provider();
    let mut config = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider speaks TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(pinned)
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(certified(identity, &provider))));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    config.enable_sni = false;
    config.try_into().expect("the provider has the cipher suite of QUIC's first packets")
}

/// The keys of which a standby must show one.
#[derive(Debug)]
pub(crate) struct Pinned {
    expected: Vec<PeerKey>,
    refused: OnceLock<Shown>,
    proof: Proof,
}

/// What a peer showed as its key; `None` when it was no Ed25519 key.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shown(pub(crate) Option<PeerKey>);

impl Pinned {
    pub(crate) fn new(expected: &[PeerKey]) -> Pinned {
        Pinned { expected: expected.to_vec(), refused: OnceLock::new(), proof: Proof::new(&provider()) }
    }

    /// What was shown in the handshake, if that is why it failed.
    pub(crate) fn refused(&self) -> Option<Shown> {
        self.refused.get().copied()
    }
}

/// Takes a client with any Ed25519 key that it proves to hold.
#[derive(Debug)]
struct AnyKey {
    proof: Proof,
}

/// Checks that a peer holds the private half of the key that it shows.
#[derive(Debug)]
struct Proof {
    algorithms: WebPkiSupportedAlgorithms,
}

impl Proof {
    fn new(provider: &CryptoProvider) -> Proof {
        Proof { algorithms: provider.signature_verification_algorithms }
    }

    fn check(&self, message: &[u8], shown: &CertificateDer<'_>, signed: &DigitallySignedStruct) -> Result<HandshakeSignatureValid, Error> {
        if signed.scheme != SignatureScheme::ED25519 {
            return Err(Error::General("only Ed25519 is accepted".into()));
        }
        verify_tls13_signature_with_raw_key(message, &SubjectPublicKeyInfoDer::from(shown.as_ref()), signed, &self.algorithms)
    }
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        shown: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let key = PeerKey::from_spki(shown);
        if key.is_some_and(|key| self.expected.contains(&key)) {
            return Ok(ServerCertVerified::assertion());
        }
        self.refused.get_or_init(|| Shown(key));
        Err(Error::General("the standby's key is not the pinned one".into()))
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.proof.check(message, shown, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for AnyKey {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(&self, shown: &CertificateDer<'_>, _: &[CertificateDer<'_>], _: UnixTime) -> Result<ClientCertVerified, Error> {
        match PeerKey::from_spki(shown) {
            Some(_) => Ok(ClientCertVerified::assertion()),
            None => Err(Error::General("only Ed25519 keys are accepted".into())),
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.proof.check(message, shown, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

fn no_tls12() -> Error {
    Error::General("TLS 1.2 is not spoken".into())
}

/// Named here and never taken from the process: which one a process has depends on what else is linked into it.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn certified(identity: &Identity, provider: &CryptoProvider) -> Arc<CertifiedKey> {
    let pkcs8 = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(identity.pkcs8().to_vec()));
    let signer = provider.key_provider.load_private_key(pkcs8).expect("an identity is an Ed25519 key");
    Arc::new(CertifiedKey::new(vec![CertificateDer::from(identity.key().spki().to_vec())], signer))
}
