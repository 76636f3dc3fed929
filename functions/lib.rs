//! The moving parts of the four hail-emr stacks: CloudFormation custom resources and event handlers on AWS Lambda.
//!
//! # Layout
//!
//! | module | what it is |
//! |---|---|
//! | [`custom_resource`] | the protocol with CloudFormation, once for all functions |
//! | [`deferred`] | where a request waits whose answer comes from an event |
//! | [`failure`] | errors, written for the person who reads the stack events |
//! | [`seed_buckets`] | `Custom::BucketSeed` in hail-s3 |
//! | [`remove_buckets`] | `Custom::BucketRemoval` in hail-s3 |
//! | [`build_ami`] | `Custom::HailAmi` and `Custom::HailAmiWait` in hail-ami |
//! | [`add_plot_steps`] | `Custom::LivyPlotSteps` in hail-emr |
//! | [`refresh_notebook`] | `Custom::NotebookRefresh` in hail-jupyter |
//!
//! `bin/` holds one binary per function, with wiring only.
//!
//! # Invariants
//!
//! - The modules of the functions do not import each other.
//! - Only [`custom_resource`] and [`deferred`] know the response URL, and neither logs it.
//! - Physical ids are derived, never invented, so that a repeated invocation gives the same one.
//! - A Delete takes away what its own resource made and nothing else.
//! - An event is a hint that something may have changed; what did change is always read from AWS itself.

pub mod add_plot_steps;
pub mod build_ami;
pub mod custom_resource;
pub mod deferred;
pub mod failure;
pub mod refresh_notebook;
pub mod remove_buckets;
pub mod seed_buckets;
