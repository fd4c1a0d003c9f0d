"""Numbers of the noise's generator, Philox-4x32 (Salmon et al., SC 2011), as every device's code reads them."""

PHILOX_ROUNDS = 7
COLUMNS_PER_BLOCK = 8
PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
