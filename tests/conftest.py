import jax

# Before the first use of a device: meshes of eight are made on any machine.
jax.config.update("jax_num_cpu_devices", 8)
